"""The way to the host by vsock (``common.channel``): a listener for ttrpc and one for stream connections.

The listeners are there before the device's driver is. The host may therefore ask for a connection while the guest
boots: it waits in the device, and is never refused.

Only the host (address 2, ``VMADDR_CID_HOST`` of linux/vm_sockets.h) is listened to, since containers have this address
family too; and if the kernel's command line says so, only to the host's reserved ports.
"""

from __future__ import annotations

import _socket
import posix

from common.channel import AGENT_VSOCK_PORT, RESERVED_PARAMETER, RESERVED_PORTS, STREAM_NUMBER, STREAM_VSOCK_PORT
from guest.agent import modules
from guest.agent.conversation import READ_SIZE, Conversation
from guest.agent.files import read_text
from guest.agent.log import log
from guest.agent.streams import StreamPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Router
    from guest.agent.streams import StreamPorts

_BACKLOG = 128


def serve(reactor: Reactor, router: Router, streams: StreamPorts) -> None:
    """Listen, and then load the driver of the device."""

    def converse(descriptor: int) -> None:
        AgentConnection(reactor, descriptor, router)

    def take_stream(descriptor: int) -> None:
        UnnamedConnection(reactor, descriptor, streams)

    is_reserved = RESERVED_PARAMETER in read_text("/proc/cmdline").split()
    peers = RESERVED_PORTS if is_reserved else range(1 << 32)
    modules.load("vsock")
    _listen(reactor, AGENT_VSOCK_PORT, peers, converse)
    _listen(reactor, STREAM_VSOCK_PORT, peers, take_stream)
    modules.load("vsock-device")


def _listen(reactor: Reactor, port: int, peers: range, on_connection: Callable[[int], None]) -> None:
    kind = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
    listener = _socket.socket(_socket.AF_VSOCK, kind)
    listener.bind((_socket.VMADDR_CID_ANY, port))
    listener.listen(_BACKLOG)

    def on_event(_events: int) -> None:
        while True:
            try:
                descriptor, (cid, peer) = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  # what `socket` makes accept() of
            except BlockingIOError:
                return
            if cid == _socket.VMADDR_CID_HOST and peer in peers:
                posix.set_blocking(descriptor, False)
                on_connection(descriptor)
            else:
                log("warning", "vsock connection refused", port=port, cid=cid, peer=peer)
                posix.close(descriptor)

    reactor.watch(listener.fileno(), on_event)


class AgentConnection:
    """One conversation, as long as its connection."""

    def __init__(self, reactor: Reactor, descriptor: int, router: Router) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._conversation = Conversation(descriptor, router)
        reactor.watch(descriptor, self._on_event)

    def _on_event(self, _events: int) -> None:
        self._conversation.flush()
        while (chunk := _read(self._descriptor)) is not None:
            if not chunk:
                self._conversation.end()
                _close(self._reactor, self._descriptor)
                return
            self._conversation.receive(chunk)


class UnnamedConnection:
    """A stream connection that has not said which stream it is."""

    def __init__(self, reactor: Reactor, descriptor: int, streams: StreamPorts) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._streams = streams
        self._number = b""
        reactor.watch(descriptor, self._on_event)

    def _on_event(self, _events: int) -> None:
        while len(self._number) < STREAM_NUMBER.size:
            part = _read(self._descriptor, STREAM_NUMBER.size - len(self._number))
            if part is None:
                return
            if not part:
                _close(self._reactor, self._descriptor)
                return
            self._number += part
        (stream,) = STREAM_NUMBER.unpack(self._number)
        self._reactor.unwatch(self._descriptor)
        connections = self._streams.connections
        if stream in connections:
            log("warning", "stream connection refused, its number is taken", stream=stream)
            posix.close(self._descriptor)
            return
        connection = StreamConnection(self._reactor, self._descriptor, lambda: connections.pop(stream))
        connections[stream] = connection
        connection.acknowledge(self._number)


class StreamConnection(StreamPort):
    """A connection that carries one use; it ends where the host closes it.

    What the host sends before the process has its standard input is kept, one chunk at most, and what it sends when the
    process reads no more is dropped.
    """

    def __init__(self, reactor: Reactor, descriptor: int, on_close: Callable[[], object]) -> None:
        super().__init__(descriptor)
        self._reactor = reactor
        self._on_close = on_close
        self._early = b""
        self._is_open = True
        reactor.watch(descriptor, self._on_event)

    def acknowledge(self, number: bytes) -> None:
        """Tell the host that the connection is known."""
        try:
            posix.write(self.descriptor, number)
        except OSError:  # it is closed already, which reading it tells
            return

    def read(self) -> bytes | None:
        """Return a chunk that the host wrote, nothing if it has closed the connection, or None if there is none now."""
        if self._early:
            chunk, self._early = self._early, b""
            return chunk
        if not self._is_open:
            return b""
        found = _read(self.descriptor)
        if found == b"":
            self._close()
        return found

    def _on_event(self, _events: int) -> None:
        if self.output is not None:
            self.output.pump()
        if self.input is not None:
            self.input.pump()
            return
        while not self._early:  # nobody reads, but the end must be seen
            chunk = self.read()
            if not chunk:
                return
            if not self.decoder.stream:  # the process has not begun to read
                self._early = chunk

    def _close(self) -> None:
        self._is_open = False
        _close(self._reactor, self.descriptor)
        self._on_close()
        if self.input is not None:
            self.input.close()
        if self.output is not None:
            self.output.finish()


def _read(descriptor: int, size: int = READ_SIZE) -> bytes | None:
    """Return what has come, nothing at the end of the connection, or None if there is nothing now."""
    try:
        return posix.read(descriptor, size)
    except BlockingIOError:
        return None
    except OSError:  # ECONNRESET
        return b""


def _close(reactor: Reactor, descriptor: int) -> None:
    reactor.unwatch(descriptor)
    posix.close(descriptor)
