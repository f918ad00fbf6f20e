"""Firecracker: jailed, hybrid vsock, disks by its REST API.

``driver`` makes machines; ``machine`` is one VM, ``drives`` the disks that come and go while it runs: on PCI, or in
place of placeholders. Below them: ``boot`` says how a VM is configured, ``api`` how Firecracker is spoken to, ``jail``
what it sees of the host, ``metrics`` what it counts, ``versions`` what a version can do.
"""
