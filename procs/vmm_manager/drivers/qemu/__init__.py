"""QEMU: q35, PVH boot, virtio-serial channel, virtio-fs, QMP.

``cmdline`` says how it is started, ``qmp`` how it is spoken to, ``virtiofsd`` serves a directory, ``machine`` is one
VM, ``driver`` makes machines, ``probe`` finds out whether KVM works.
"""
