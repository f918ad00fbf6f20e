"""QEMU: q35, PVH boot, virtio-serial channel, virtio-fs, QMP.

``driver`` makes machines, with KVM if ``probe`` saw it work; ``machine`` is one VM, ``devices`` what is hot-plugged
into it: ``shares`` and ``disks``, on the buses of ``topology``. Below them: ``cmdline`` says how QEMU is started and
``qmp`` how it is spoken to, ``virtiofsd`` serves a directory, ``spawn`` starts what outlives us, ``console`` and
``output`` keep what guest and processes print.
"""
