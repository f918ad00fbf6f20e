"""The channel to a guest: one connection for the agent, ports for standard streams. Above it all devices are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from common.services.channel import HybridVsock, KernelVsock, VirtioSerial

if TYPE_CHECKING:
    import socket

    from common.services.channel import GuestChannel
    from procs.shim.ports import Ports


class Channel(Protocol):
    """How a shim reaches its guest.

    Attributes:
        ports: where processes get their streams.
    """

    @property
    def ports(self) -> Ports:
        """Where processes get their streams."""

    async def connect_agent(self) -> socket.socket:
        """Wait until the guest's agent is there, for ever, and return a connection that carries ttrpc.

        Raises:
            UnavailableError: the VM is gone.
            GuestError: what answers is not the agent.
        """


def open_channel(where: GuestChannel) -> Channel:
    """Return the channel that the VM manager describes. Nothing is connected yet."""
    match where:
        case VirtioSerial():
            from procs.shim.serial import SerialChannel

            return SerialChannel(where)
        case HybridVsock() | KernelVsock():
            from procs.shim.vsock import VsockChannel

            return VsockChannel(where)
