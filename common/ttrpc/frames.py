"""The ttrpc wire format, without I/O: bytes in, frames out. Part of the guest.

::

    0        4         8     9      10
    | length | stream  | type| flags| payload (length bytes, at most 4 MiB)        big-endian

A frame longer than the limit is not read into memory: its payload is skipped as it comes and the frame is reported
without payload, so that its sender can be answered on that stream.

Source: https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md and ``channel.go``, ``request.proto`` beside it.
"""

from __future__ import annotations

import struct

from common.protobuf import Message, bytes_, int_, message, messages, string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST, RESPONSE, DATA = 1, 2, 3
MAX_PAYLOAD = 4 << 20
_HEADER = struct.Struct(">IIBB")


class KeyValue(Message):
    """One piece of request metadata."""

    key: str = string(1)
    value: str = string(2)


class Request(Message):
    """A call. ``timeout_nano`` is relative; 0 means none."""

    service: str = string(1)
    method: str = string(2)
    payload: bytes = bytes_(3)
    timeout_nano: int = int_(4)
    metadata: list[KeyValue] = messages(5, KeyValue)


class Status(Message):
    """``google.rpc.Status`` without its details."""

    code: int = int_(1)
    message: str = string(2)


class Response(Message):
    """The answer to a call: ``status`` absent or with code 0 means that ``payload`` is the reply."""

    status: Status | None = message(1, Status)
    payload: bytes = bytes_(2)


class Frame:
    """One frame as it came: ``payload`` is None if it was longer than the limit."""

    __slots__ = ("flags", "payload", "stream", "type")

    def __init__(self, stream: int, kind: int, flags: int, payload: bytes | None) -> None:
        self.stream = stream
        self.type = kind
        self.flags = flags
        self.payload = payload


def encode(stream: int, kind: int, payload: bytes) -> bytes:
    """Return a frame's bytes.

    Raises:
        ValueError: the payload is longer than ``MAX_PAYLOAD``.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"message of {len(payload)} bytes exceeds ttrpc's limit of {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), stream, kind, 0) + payload


class Decoder:
    """Turns a byte stream into frames. Holds at most one frame of ``MAX_PAYLOAD`` bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._buffer and not self._skip

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes as they came; yield each frame that they complete."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            length, stream, kind, flags = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if length > MAX_PAYLOAD:
                self._skip = max(0, end - len(self._buffer))
                del self._buffer[:end]
                yield Frame(stream, kind, flags, None)
            elif len(self._buffer) < end:
                return
            else:
                payload = bytes(self._buffer[_HEADER.size : end])
                del self._buffer[:end]
                yield Frame(stream, kind, flags, payload)
