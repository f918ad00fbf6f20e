"""ttrpc: containerd's RPC over one byte stream, spoken with containerd and with the guest's agent alike.

``frames`` is the wire format without any I/O and runs in the guest too; ``server`` and ``client`` are its asyncio ends
on the host. Wire: https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md.
"""
