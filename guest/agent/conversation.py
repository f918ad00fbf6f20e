"""A conversation in ttrpc over one descriptor, from its beginning to its end."""

from __future__ import annotations

import posix

from common import status
from common.ttrpc.frames import MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, Response, Status, encode
from guest.agent.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Router

READ_SIZE = 64 << 10


class Conversation:
    """Hands requests to the router and writes answers. One that comes after the end is dropped: nobody waits for it."""

    def __init__(self, descriptor: int, router: Router) -> None:
        self._descriptor = descriptor
        self._router = router
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._is_over = False

    @property
    def is_between_frames(self) -> bool:
        """Whether no request is half read."""
        return self._decoder.is_between_frames

    def receive(self, chunk: bytes) -> None:
        """Take bytes as they came."""
        for frame in self._decoder.feed(chunk):
            self._handle(frame)

    def send(self, data: bytes) -> None:
        """Write, now or when the other end takes it."""
        if not self._is_over:
            self._unsent += data
            self.flush()

    def flush(self) -> None:
        """Write what is left of earlier answers, as far as the other end takes it."""
        try:
            while self._unsent:
                del self._unsent[: posix.write(self._descriptor, self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # EPIPE, ECONNRESET of a connection, whose end reading it tells
            self.end()

    def end(self) -> None:
        """Send nothing more."""
        self._is_over = True
        self._unsent.clear()

    def _handle(self, frame: Frame) -> None:
        def answer(response: Response) -> None:
            self.send(_response_frame(frame.stream, response))

        if frame.type != REQUEST:
            log("warning", "frame is not a request", stream=frame.stream, type=frame.type)
        elif frame.payload is None:
            answer(_failure(status.RESOURCE_EXHAUSTED, f"request exceeds ttrpc's limit of {MAX_PAYLOAD} bytes"))
        else:
            self._router.handle(frame.payload, answer)


def _failure(code: int, text: str) -> Response:
    return Response(status=Status(code=code, message=text))


def _response_frame(stream: int, response: Response) -> bytes:
    payload = response.encode()
    if len(payload) > MAX_PAYLOAD:
        payload = _failure(status.RESOURCE_EXHAUSTED, f"reply of {len(payload)} bytes exceeds ttrpc's limit").encode()
    return encode(stream, RESPONSE, payload)
