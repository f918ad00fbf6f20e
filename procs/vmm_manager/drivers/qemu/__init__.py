"""QEMU: q35, PVH boot, virtio-serial channel, virtio-fs, QMP.

``driver`` makes machines, with KVM if ``probe`` saw it work; ``machine`` is one VM, ``shares`` its devices. Below them:
``cmdline`` says how QEMU is started and ``qmp`` how it is spoken to, ``virtiofsd`` serves a directory, ``spawn`` starts
what outlives us, ``console`` and ``output`` keep what guest and processes print.
"""
