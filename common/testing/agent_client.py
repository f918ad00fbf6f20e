"""The host's end of a guest's channel, in a test: a conversation with the agent, and streams.

Synchronous, and knowing no more than the wire formats, so that a test can also send what no client would.
"""

from __future__ import annotations

import bisect
import os
from typing import TYPE_CHECKING, Self, TypeVar

from common.channel import HEADER, HELLO, HELLO_REPLY, NONCE_SIZE, StreamDecoder, port_of
from common.protobuf import Message
from common.protocols.agent import AGENT_SERVICE
from common.ttrpc import frames

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

M = TypeVar("M", bound=Message)


class AgentError(Exception):
    """The agent answered with an error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} (code {code})")
        self.code = code
        self.text = text


class AgentClient:
    """A conversation with the agent."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._decoder = frames.Decoder()
        self._next_stream = 1
        self._answers: dict[int, frames.Response] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say_hello(self) -> bytes:
        """Begin the conversation; return what the last one had left."""
        nonce = os.urandom(NONCE_SIZE)
        self.socket.sendall(HELLO + nonce)
        received = b""
        while HELLO_REPLY + nonce not in received:
            received += self._receive()
        left, _, rest = received.partition(HELLO_REPLY + nonce)
        self._take(rest)
        return left

    def begin(self, service: str, method: str, request: Message, **metadata: str) -> int:
        """Send a request; return its stream, for :meth:`finish`."""
        pairs = [frames.KeyValue(key=key.replace("_", "-"), value=value) for key, value in metadata.items()]
        payload = frames.Request(service=service, method=method, payload=request.encode(), metadata=pairs).encode()
        return self.send_frame(frames.REQUEST, payload)

    def send_frame(self, kind: int, payload: bytes) -> int:
        """Send a frame; return its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.socket.sendall(frames.encode(stream, kind, payload))
        return stream

    def is_answered(self, stream: int) -> bool:
        """Return whether the answer has been seen already, while other answers were waited for."""
        return stream in self._answers

    def finish(self, stream: int, reply: type[M]) -> M:
        """Wait for an answer.

        Raises:
            AgentError: it is an error.
        """
        while stream not in self._answers:
            self._take(self._receive())
        answer = self._answers.pop(stream)
        if answer.status and answer.status.code:
            raise AgentError(answer.status.code, answer.status.message)
        return reply.decode(answer.payload)

    def call(self, service: str, method: str, request: Message, reply: type[M], **metadata: str) -> M:
        """Send a request and wait for its answer."""
        return self.finish(self.begin(service, method, request, **metadata), reply)

    def ask(self, method: str, request: Message, reply: type[M]) -> M:
        """Call a method of the agent service."""
        return self.call(AGENT_SERVICE, method, request, reply)

    def _receive(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError("QEMU closed the agent port")
        return data

    def _take(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            self._answers[frame.stream] = frames.Response.decode(frame.payload or b"")


class Stream:
    """The host's end of one use of a stream port."""

    def __init__(self, connection: socket.socket, number: int, free_ports: list[int]) -> None:
        self.socket = connection
        self.number = number
        self._free_ports = free_ports
        self._decoder = StreamDecoder(number)

    def close(self) -> None:
        """Close the host's end and give the port back; once."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            bisect.insort(self._free_ports, port_of(self.number))

    def write(self, payload: bytes) -> None:
        """Send a frame; an empty one is the end."""
        self.socket.sendall(HEADER.pack(self.number, len(payload)) + payload)

    def chunks(self) -> Iterator[bytes]:
        """Yield what the guest sends until the stream ends."""
        while not self._decoder.is_ended:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError("QEMU closed the stream port")
            yield from map(bytes, self._decoder.feed(data))

    def read_all(self) -> bytes:
        """Return what the guest sends until the stream ends."""
        return b"".join(self.chunks())

    def read_until(self, wanted: bytes) -> bytes:
        """Return what the guest sends until ``wanted`` is in it."""
        received = b""
        for chunk in self.chunks():
            received += chunk
            if wanted in received:
                break
        return received
