"""Standard streams by calls, as upstream's shim has them: ReadStdout, ReadStderr, WriteStdin, CloseStdin.

A call waits for its answer, so the pace is the caller's: what nobody asks for stays in the process's pipe. A call that
comes before the process has begun waits for that.
"""

from __future__ import annotations

import posix

from common import status
from common.channel import MAX_CHUNK
from common.protocols.agent import Empty, ReadStreamResponse, WriteStreamResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call


class CallOutput:
    """Output of a process, read by calls. Owns the descriptor that it reads."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._source = -1
        self._waiting: list[tuple[int, Call]] = []
        self._is_draining = False
        self._is_ended = False

    def attach(self, source: int) -> None:
        """Read from here: the process begins."""
        self._source = source
        posix.set_blocking(source, False)
        self._reactor.watch(source, lambda _events: self._pump())

    def read(self, size: int, call: Call) -> None:
        """Answer with at most ``size`` bytes when there are some, or with none at the end."""
        self._waiting.append((min(size, MAX_CHUNK) or MAX_CHUNK, call))
        self._pump()

    def drain(self) -> None:
        """End where the pipe is empty: the process is gone, and nothing else may keep its stream open."""
        self._is_draining = True
        if self._source < 0:
            self.close()
        self._pump()

    def close(self) -> None:
        """End now."""
        self._is_ended = True
        if self._source >= 0:
            self._reactor.unwatch(self._source)
            posix.close(self._source)
            self._source = -1
        waiting, self._waiting = self._waiting, []
        for _size, call in waiting:
            call.reply(ReadStreamResponse())

    def _pump(self) -> None:
        while self._waiting and self._source >= 0:
            size, call = self._waiting[0]
            data = self._read_some(size)
            if data is None:
                return
            if not data:
                self.close()
                return
            del self._waiting[0]
            call.reply(ReadStreamResponse(data=data))
        if self._is_ended:
            self.close()

    def _read_some(self, size: int) -> bytes | None:
        """Return what is there, nothing at the end, or None if more may come."""
        try:
            return posix.read(self._source, size)
        except BlockingIOError:
            return b"" if self._is_draining else None
        except OSError:  # a terminal says EIO when its last user is gone
            return b""


class CallInput:
    """Input of a process, written by calls. Owns the descriptor that it writes."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._sink = -1
        self._waiting: list[tuple[bytes, Call]] = []
        self._written = 0
        self._is_ending = False
        self._is_over = False

    def attach(self, sink: int) -> None:
        """Write there: the process begins."""
        self._sink = sink
        posix.set_blocking(sink, False)
        self._reactor.watch(sink, lambda _events: self._pump())
        self._pump()

    def write(self, data: bytes, call: Call) -> None:
        """Answer when the process has taken all of it. No data is the end of the stream."""
        if not data:
            self._end()
            call.reply(WriteStreamResponse())
        elif self._is_over or self._is_ending:
            call.fail(status.FAILED_PRECONDITION, "standard input is closed")
        else:
            self._waiting.append((data, call))
            self._pump()

    def end(self, call: Call) -> None:
        """Let the stream end behind what is still to be written, and answer."""
        self._end()
        call.reply(Empty())

    def close(self) -> None:
        """End now: the process is gone or reads no more."""
        self._is_over = True
        if self._sink >= 0:
            self._reactor.unwatch(self._sink)
            posix.close(self._sink)
            self._sink = -1
        waiting, self._waiting = self._waiting, []
        for _data, call in waiting:
            call.fail(status.FAILED_PRECONDITION, "the process reads no more")

    def _end(self) -> None:
        self._is_ending = True
        self._pump()

    def _pump(self) -> None:
        if self._sink < 0:
            return
        try:
            while self._waiting:
                data, call = self._waiting[0]
                while self._written < len(data):
                    self._written += posix.write(self._sink, memoryview(data)[self._written :])
                del self._waiting[0]
                self._written = 0
                call.reply(WriteStreamResponse(len=len(data)))
        except BlockingIOError:
            return
        except OSError:  # EPIPE, or EIO of a terminal
            self.close()
        if self._is_ending:
            self.close()
