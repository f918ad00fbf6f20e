"""The agent port: conversations that begin with a hello (``common.channel``), then ttrpc frames.

A port has no connections, so where a conversation ends must be found in the bytes. Two facts of virtio-serial help:
QEMU hands every chunk that it reads from the host's socket to the guest in a buffer of its own, and one read(2) of the
port returns at most one buffer (drivers/char/virtio_console.c, fill_readbuf). Bytes of two conversations are thus never
in one chunk. A conversation ends where

- the port reports that the host's end is closed: what remains of it is read and dropped;
- a hello begins where a frame could: as a frame, its first bytes would announce more than ttrpc allows;
- a chunk in the middle of a frame is exactly a hello, which the host sends alone: that its end was closed in between
  went by unseen.

Answers to calls of an earlier conversation are dropped, since their stream numbers now belong to other calls.
"""

from __future__ import annotations

import posix

from common import status
from common.channel import HELLO, HELLO_REPLY, NONCE_SIZE
from common.ttrpc.frames import MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, Response, Status, encode
from guest.agent.log import log
from guest.agent.reactor import HANGUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Router

_READ_SIZE = 64 << 10
_HELLO_SIZE = len(HELLO) + NONCE_SIZE


class Connection:
    """Owns the agent port: reads requests, hands them to the router, writes answers."""

    def __init__(self, reactor: Reactor, port: int, router: Router) -> None:
        self._port = port
        self._router = router
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._conversation = 0
        self._is_greeted = False
        reactor.watch(port, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & HANGUP:
            # First: the host may be back already, and what is read next be its hello.
            self._begin(is_greeted=False)
        self._write()
        self._read()

    def _read(self) -> None:
        while True:
            try:
                chunk = posix.read(self._port, _READ_SIZE)
            except BlockingIOError:
                return
            if not chunk:  # the host's end is closed
                self._begin(is_greeted=False)
                return
            self._receive(chunk)

    def _receive(self, chunk: bytes) -> None:
        if _is_hello(chunk, self._decoder):
            self._begin(is_greeted=True)
            self._send(HELLO_REPLY + chunk[len(HELLO) : _HELLO_SIZE])
            chunk = chunk[_HELLO_SIZE:]
        if self._is_greeted:
            for frame in self._decoder.feed(chunk):
                self._handle(frame)

    def _begin(self, *, is_greeted: bool) -> None:
        """Forget all of the last conversation."""
        self._decoder = Decoder()
        self._unsent.clear()
        self._conversation += 1
        self._is_greeted = is_greeted

    def _handle(self, frame: Frame) -> None:
        conversation = self._conversation

        def answer(response: Response) -> None:
            if conversation == self._conversation:
                self._send(_response_frame(frame.stream, response))

        if frame.type != REQUEST:
            log("warning", "frame is not a request", stream=frame.stream, type=frame.type)
        elif frame.payload is None:
            answer(_failure(status.RESOURCE_EXHAUSTED, f"request exceeds ttrpc's limit of {MAX_PAYLOAD} bytes"))
        else:
            self._router.handle(frame.payload, answer)

    def _send(self, data: bytes) -> None:
        self._unsent += data
        self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: posix.write(self._port, self._unsent)]
        except BlockingIOError:
            return


def _is_hello(chunk: bytes, decoder: Decoder) -> bool:
    begins_so = chunk.startswith(HELLO) and len(chunk) >= _HELLO_SIZE
    return begins_so and (decoder.is_between_frames or len(chunk) == _HELLO_SIZE)


def _failure(code: int, text: str) -> Response:
    return Response(status=Status(code=code, message=text))


def _response_frame(stream: int, response: Response) -> bytes:
    payload = response.encode()
    if len(payload) > MAX_PAYLOAD:
        payload = _failure(status.RESOURCE_EXHAUSTED, f"reply of {len(payload)} bytes exceeds ttrpc's limit").encode()
    return encode(stream, RESPONSE, payload)
