"""virtio-serial ports by the name that the host gave them, and the kernel's news of devices.

A port's name comes to the guest after its device; the kernel tells of both by a uevent (lib/kobject_uevent.c), so
whoever misses a device asks again when one comes.
"""

from __future__ import annotations

import _socket  # the C half of `socket`, whose Python half costs 0.1 s
import posix

from common import status
from common.channel import STREAM_PORT, ChannelError, StreamDecoder, port_of
from guest.agent.files import read_text
from guest.agent.frames import CopiedFrames, SplicedFrames, is_pipe
from guest.agent.patience import Patience
from guest.agent.reactor import HANGUP, IN, OUT
from guest.agent.rpc import RpcError
from guest.agent.streams import READ_SIZE, StreamPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reactor import Reactor

_SYSFS = "/sys/class/virtio-ports"
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_MAX_EVENT = 8192


class Uevents:
    """Tells who asked whenever the kernel has news of a device."""

    def __init__(self, reactor: Reactor) -> None:
        kind = _socket.SOCK_RAW | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        self._socket.bind((0, _KERNEL_GROUP))
        self._listeners: list[Callable[[], None]] = []
        reactor.watch(self._socket.fileno(), self._on_event)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at every piece of news."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Stop calling it."""
        self._listeners.remove(listener)

    def _on_event(self, _events: int) -> None:
        try:
            while True:
                self._socket.recv(_MAX_EVENT)
        except BlockingIOError:
            pass
        for listener in list(self._listeners):
            listener()


class Ports:
    """The ports of the VM; each name is read once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def node(self, name: str) -> str | None:
        """Return the device node of a port, or None if the guest does not have it (yet)."""
        if name not in self._names.values():
            self._names |= {port: text for port in posix.listdir(_SYSFS) if (text := self._name(port))}
        return next((f"/dev/{port}" for port, text in self._names.items() if text == name), None)

    def _name(self, port: str) -> str:
        """Return a port's name, or nothing while that is still to come."""
        return self._names.get(port) or read_text(f"{_SYSFS}/{port}/name").rstrip("\n")


def open_port(node: str) -> int:
    """Open a port; only one may have it open at a time."""
    return posix.open(node, posix.O_RDWR | posix.O_NONBLOCK | posix.O_CLOEXEC)


class SerialPorts:
    """The stream ports among them, opened when they are first used."""

    def __init__(self, reactor: Reactor, found: Ports) -> None:
        self._reactor = reactor
        self._patience = Patience(reactor)
        self._found = found
        self._ports: dict[int, SerialPort] = {}

    def find(self, stream: int) -> SerialPort | None:
        """Return the port that a stream number names, or None if the VM has no such port.

        Raises:
            RpcError: no VM has one.
        """
        try:
            number = port_of(stream)
        except ChannelError as err:
            raise RpcError(status.INVALID_ARGUMENT, str(err)) from err
        if number not in self._ports:
            node = self._found.node(f"{STREAM_PORT}{number}")
            if node is None:
                return None
            self._ports[number] = SerialPort(self._reactor, open_port(node), self._patience)
        return self._ports[number]


class SerialPort(StreamPort):
    """A port and its present use. Stays open for the next use.

    A port tells of every buffer that the host has taken, which is news only to output that waits for room.
    """

    def __init__(self, reactor: Reactor, descriptor: int, patience: Patience) -> None:
        super().__init__(descriptor)
        self._reactor = reactor
        self._patience = patience
        reactor.watch(descriptor, self._on_event, IN)

    def wait_room(self) -> None:
        """See the base class."""
        self._reactor.rewatch(self.descriptor, IN | OUT)

    def read(self) -> bytes | None:
        """Return a chunk that the host wrote, nothing if it has closed its end, or None if there is no chunk now."""
        try:
            chunk = posix.read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return None
        if not chunk:
            self.decoder = StreamDecoder(self.input.stream if self.input else 0)
        return chunk

    def frames(self, stream: int, source: int) -> CopiedFrames:
        """Return what makes frames of a descriptor's bytes."""
        return SplicedFrames(stream, self._patience.note_flow) if is_pipe(source) else CopiedFrames(stream)

    def _on_event(self, events: int) -> None:
        if events & OUT:
            self._reactor.rewatch(self.descriptor, IN)
            if self.output is not None:
                self.output.pump()
        if self.input is not None:
            self.input.pump()
        elif events & HANGUP:  # what is left was for a process that is gone
            while self.read():
                pass
