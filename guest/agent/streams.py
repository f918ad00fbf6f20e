"""Standard streams: bytes between a process's pipe or terminal and a stream port, in frames of ``common.channel``.

A port is one of virtio-serial (``guest.agent.ports``) or a vsock connection (``guest.agent.vsock``).

Back-pressure comes from not reading: a port that the host does not empty stops the reading of its process's pipe, and a
process that does not read stops the reading of its port; neither stops anybody else.

The host takes a port again only after the end of what came from it last, so the first byte that it reads begins a frame
(``guest.agent.frames`` says how frames are made).
"""

from __future__ import annotations

import posix

from common import status
from common.channel import StreamDecoder
from common.protocols.agent import Empty, TakenRequest
from guest.agent.frames import CopiedFrames, WindowClosedError
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call

READ_SIZE = 64 << 10
_BURST = 16
"""Frames after which others get their turn."""


class StreamPort:
    """What carries the frames: at most one stream in and one out at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.input: Input | None = None
        self.output: Output | None = None
        self.decoder = StreamDecoder(0)

    def read(self) -> bytes | None:
        """Return a chunk that the host wrote, nothing if it has closed its end, or None if there is no chunk now."""
        raise NotImplementedError

    def wait_room(self) -> None:
        """Have the output go on when the port takes more; a connection does so by itself."""

    def frames(self, stream: int, _source: int) -> CopiedFrames:
        """Return what makes frames of a descriptor's bytes."""
        return CopiedFrames(stream)


class StreamPorts:
    """The VM's stream ports by stream number.

    Attributes:
        connections: those that the host has made by vsock.
    """

    def __init__(self, find_serial: Callable[[int], StreamPort | None]) -> None:
        self.connections: dict[int, StreamPort] = {}
        self._find_serial = find_serial

    def get(self, stream: int) -> StreamPort:
        """Return the port that a stream number names.

        Raises:
            RpcError: there is no such port, or it still has output of an earlier process.
        """
        port = self.connections.get(stream) or self._find_serial(stream)
        if port is None:
            raise RpcError(status.UNAVAILABLE, f"this virtual machine has no port for stream {stream:#x}")
        if port.output is not None:
            raise RpcError(status.FAILED_PRECONDITION, f"stream {stream:#x}: its port still has other output")
        return port

    def note_taken(self, request: TakenRequest, _call: Call) -> Empty:
        """Note what the host has handed on. It may be of a process that has ended meanwhile."""
        port = self.connections.get(request.stream) or self._find_serial(request.stream)
        if port is not None and port.output is not None and port.output.stream == request.stream:
            port.output.allow(request.size)
        return Empty()


class Output:
    """From a process to a port, with an empty frame as the end. Owns the descriptor that it reads."""

    def __init__(
        self, reactor: Reactor, port: StreamPort, stream: int, source: int, on_end: Callable[[], None]
    ) -> None:
        self.stream = stream
        self._reactor = reactor
        self._port = port
        self._source = source
        self._on_end = on_end
        self._frames = port.frames(stream, source)
        self._is_draining = False
        self._is_at_end = False
        port.output = self
        posix.set_blocking(source, False)
        reactor.watch(source, lambda _events: self.pump())

    def drain(self) -> None:
        """Send what is in the pipe and end: the process is gone, and nothing else may keep its stream open.

        A process that it left behind may hold the other end of the pipe for ever; upstream's agent ends here too.
        """
        self._is_draining = True
        self.pump()

    def allow(self, size: int) -> None:
        """Note that the host has handed on so many bytes."""
        self._frames.allow(size)
        self.pump()

    def pump(self) -> None:
        """Move bytes until the source has none or the port takes none."""
        for _ in range(_BURST):
            if self._port.output is not self:
                return
            if not (self._send() and self._fill()):
                return
        self._reactor.soon(self.pump)

    def _send(self) -> bool:
        """Hand the frame to the port; return whether it is gone."""
        try:
            self._frames.send(self._port.descriptor)
        except BlockingIOError:
            self._port.wait_room()
            return False
        except OSError:  # a connection that the host has closed
            self._is_at_end = True
        if self._is_at_end:
            self.finish()
        return not self._is_at_end

    def _fill(self) -> bool:
        """Take the next frame; return whether there is one."""
        try:
            self._is_at_end = not self._frames.fill(self._source)
        except WindowClosedError:
            return False
        except BlockingIOError:
            self._is_at_end = self._is_draining
            if not self._is_draining:
                return False
            self._frames.end()
        except OSError:  # a terminal says EIO when its last user is gone
            self._is_at_end = True
            self._frames.end()
        return True

    def finish(self) -> None:
        """Let go of process and port: a process that writes on finds that nobody reads."""
        self._port.output = None
        self._frames.close()
        self._reactor.unwatch(self._source)
        posix.close(self._source)
        self._on_end()


class Input:
    """From a port to a process. Owns the descriptor that it writes, and closes it where the stream ends."""

    def __init__(self, reactor: Reactor, port: StreamPort, stream: int, sink: int) -> None:
        self.stream = stream
        self._reactor = reactor
        self._port = port
        self._sink = sink
        self._unsent = b""
        self._is_open = True
        port.input = self
        port.decoder.begin(stream)
        posix.set_blocking(sink, False)
        reactor.watch(sink, lambda _events: self.pump())

    def close(self) -> None:
        """Let go of process and port; frames that are still to come are dropped by the port's next use."""
        if self._port.input is self:
            self._port.input = None
        self._close_sink()

    def pump(self) -> None:
        """Move bytes until the port has none or the process takes none."""
        while self._port.input is self and self._deliver():
            if self._port.decoder.is_ended:
                self.close()
                return
            chunk = self._port.read()
            if not chunk:
                return
            self._unsent = b"".join(self._port.decoder.feed(chunk))

    def _deliver(self) -> bool:
        """Write to the process; return whether it took all. What a process that reads no more should get is dropped."""
        try:
            while self._unsent and self._is_open:
                self._unsent = self._unsent[posix.write(self._sink, self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:  # EPIPE, or EIO of a terminal
            self._close_sink()
        return True

    def _close_sink(self) -> None:
        if self._is_open:
            self._is_open = False
            self._reactor.unwatch(self._sink)
            posix.close(self._sink)
