"""Standard streams: bytes between a process's pipe or terminal and a stream port, in frames of ``common.channel``.

Back-pressure comes from not reading: a port that the host does not empty stops the reading of its process's pipe, and a
process that does not read stops the reading of its port; neither stops anybody else.

A frame is written with one write(2) and fits in one virtio buffer. The host gets all of it or, if it closes its end,
nothing, so the first byte that it reads after opening a port begins a frame.
"""

from __future__ import annotations

import posix

from common import status
from common.channel import HEADER, ChannelError, StreamDecoder, port_of
from guest.agent.reactor import HANGUP
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.ports import Ports
    from guest.agent.reactor import Reactor

_VIRTIO_BUFFER = 32 << 10
"""Largest write that a port takes as one buffer (drivers/char/virtio_console.c, port_fops_write)."""
_PAYLOAD = _VIRTIO_BUFFER - HEADER.size
_READ_SIZE = 64 << 10
_BURST = 16
"""Frames after which others get their turn."""


class StreamPort:
    """A port and its present use: at most one stream in and one out. Stays open for the next use."""

    def __init__(self, reactor: Reactor, descriptor: int) -> None:
        self.descriptor = descriptor
        self.input: Input | None = None
        self.output: Output | None = None
        self.decoder = StreamDecoder(0)
        reactor.watch(descriptor, self._on_event)

    def read(self) -> bytes | None:
        """Return a chunk that the host wrote, nothing if it has closed its end, or None if there is no chunk now."""
        try:
            chunk = posix.read(self.descriptor, _READ_SIZE)
        except BlockingIOError:
            return None
        if not chunk:
            self.decoder = StreamDecoder(self.input.stream if self.input else 0)
        return chunk

    def _on_event(self, events: int) -> None:
        if self.output is not None:
            self.output.pump()
        if self.input is not None:
            self.input.pump()
        elif events & HANGUP:  # what is left was for a process that is gone
            while self.read():
                pass


class StreamPorts:
    """The VM's stream ports by number, opened when they are first used."""

    def __init__(self, reactor: Reactor, found: Ports) -> None:
        self._reactor = reactor
        self._found = found
        self._ports: dict[int, StreamPort] = {}

    def get(self, stream: int) -> StreamPort:
        """Return the port that a stream number names.

        Raises:
            RpcError: there is no such port, or it still has output of an earlier process.
        """
        try:
            number = port_of(stream)
        except ChannelError as err:
            raise RpcError(status.INVALID_ARGUMENT, str(err)) from err
        if number not in self._ports:
            self._ports[number] = StreamPort(self._reactor, self._found.open_stream(number))
        port = self._ports[number]
        if port.output is not None:
            raise RpcError(status.FAILED_PRECONDITION, f"stream {stream:#x}: port {number} still has other output")
        return port


class Output:
    """From a process to a port, with an empty frame as the end. Owns the descriptor that it reads."""

    def __init__(
        self, reactor: Reactor, port: StreamPort, stream: int, source: int, on_end: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._port = port
        self._stream = stream
        self._source = source
        self._on_end = on_end
        self._frame = memoryview(bytearray(_VIRTIO_BUFFER))
        self._unsent = self._frame[:0]
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
        if self._unsent:
            try:
                posix.write(self._port.descriptor, self._unsent)
            except BlockingIOError:
                return False
            self._unsent = self._frame[:0]
            if self._is_at_end:
                self._finish()
                return False
        return True

    def _fill(self) -> bool:
        """Read the next frame's payload; return whether there is a frame."""
        try:
            size = posix.readv(self._source, [self._frame[HEADER.size :]])
        except BlockingIOError:
            if not self._is_draining:
                return False
            size = 0
        except OSError:  # a terminal says EIO when its last user is gone
            size = 0
        self._is_at_end = size == 0
        HEADER.pack_into(self._frame, 0, self._stream, size)
        self._unsent = self._frame[: HEADER.size + size]
        return True

    def _finish(self) -> None:
        self._port.output = None
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
