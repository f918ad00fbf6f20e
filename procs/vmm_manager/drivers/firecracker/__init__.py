"""Firecracker: jailed, hybrid vsock, disks and network devices by its REST API.

``driver`` makes machines; ``machine`` is one VM, ``devices`` what comes and goes while it runs, ``kinds`` which
kinds there are, ``places`` where it goes: on PCI, or disks in place of placeholders. Below them: ``boot`` says how a VM
is configured, ``api`` how Firecracker is spoken to, ``jail`` what it sees of the host, ``metrics`` what it counts,
``versions`` what a version can do.
"""
