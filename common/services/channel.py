"""How the host reaches a VM's guest: part of the VM manager's contract, filled in by the driver.

Above it nothing differs: the agent protocol on one connection, and standard streams in frames (:mod:`common.channel`).
"""

from __future__ import annotations

import msgspec


class VirtioSerial(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="virtio-serial"):
    """Ports of a virtio console device (virtio 1.2, 5.3), each a Unix socket on the host.

    Attributes:
        agent_socket: socket of the agent's port.
        stream_sockets: sockets of the stream ports; index n is the guest's port ``kata.stream.n``.
    """

    agent_socket: str
    stream_sockets: tuple[str, ...]


class HybridVsock(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="hybrid-vsock"):
    r"""A virtio socket device whose host side is a Unix socket.

    A client writes ``CONNECT <port>\n`` and reads ``OK <number>\n``; then it is connected to that port of the guest
    (docs/vsock.md of Firecracker, docs/vsock.md of Cloud Hypervisor).

    Attributes:
        socket: the Unix socket.
        is_late: whether the socket is not there before the guest's driver is, and who comes earlier waits for it.
    """

    socket: str
    is_late: bool = False


class KernelVsock(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vsock"):
    """A virtio socket device whose host side is the host's kernel: AF_VSOCK (vsock(7)), by vhost-vsock.

    Attributes:
        cid: the guest's address, unique on the host while the VM runs.
    """

    cid: int


GuestChannel = VirtioSerial | HybridVsock | KernelVsock
