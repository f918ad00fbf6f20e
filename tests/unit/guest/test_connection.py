"""Conversations on the agent port, over a socket that keeps chunks apart as virtio-serial does."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from common import status
from common.channel import HELLO, HELLO_REPLY
from common.protocols.health import CheckRequest, HealthCheckResponse
from common.ttrpc import frames
from guest.agent.connection import Connection
from guest.agent.reactor import HANGUP, IN, Reactor
from guest.agent.rpc import Call, Router, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.protobuf import Message
    from guest.agent.rpc import Methods

NONCE = bytes(range(16))


class Host:
    """The host's end, and an agent of one service with a method of each kind."""

    def __init__(self) -> None:
        self.socket, agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)  # the agent answers within one round of its loop
        self.reactor = Reactor()
        self.late: list[Call] = []
        methods: Methods = {
            "Now": (CheckRequest, lambda _request, _call: HealthCheckResponse(status=7)),
            "Later": (CheckRequest, lambda _request, call: self.late.append(call)),
            "Refused": (CheckRequest, self._refuse),
            "Broken": (CheckRequest, lambda request, _call: request.absent),
        }
        agent.setblocking(False)
        self._agent = agent.detach()
        self.connection = Connection(self.reactor, self._agent, Router({"test": methods}))

    def close(self) -> None:
        self.socket.close()
        os.close(self._agent)

    def send(self, data: bytes) -> None:
        """Send one chunk and let the agent handle it."""
        self.socket.send(data)
        self.reactor.run_once()

    def hello(self, nonce: bytes = NONCE) -> None:
        self.send(HELLO + nonce)
        assert self.socket.recv(100) == HELLO_REPLY + nonce

    def receive(self) -> tuple[int, frames.Response]:
        (frame,) = frames.Decoder().feed(self.socket.recv(1 << 16))
        return frame.stream, frames.Response.decode(frame.payload or b"")

    def is_silent(self) -> bool:
        try:
            return not self.socket.recv(1 << 16)
        except BlockingIOError:
            return True

    @staticmethod
    def _refuse(_request: CheckRequest, _call: Call) -> Message | None:
        raise RpcError(status.ABORTED, "not today")


@pytest.fixture
def host() -> Iterator[Host]:
    ends = Host()
    yield ends
    ends.close()


def call(method: str, stream: int = 1, service: str = "test") -> bytes:
    pairs = [frames.KeyValue(key="request-id", value="r1")]
    return frames.encode(
        stream, frames.REQUEST, frames.Request(service=service, method=method, metadata=pairs).encode()
    )


def test_a_call_is_answered_on_its_stream(host: Host) -> None:
    host.hello()
    host.send(call("Now", 5))
    stream, response = host.receive()
    assert (stream, HealthCheckResponse.decode(response.payload).status) == (5, 7)


def test_a_hangup_that_is_heard_late_does_not_end_the_next_conversation(host: Host) -> None:
    """The host closes and opens its end before the agent looks: the event is old, the hello is new."""
    host.hello()
    host.socket.send(call("Now")[:10])
    host.socket.send(HELLO + NONCE)
    host.connection._on_event(IN | HANGUP)
    assert host.socket.recv(100) == HELLO_REPLY + NONCE
    host.send(call("Now", 5))
    assert host.receive()[0] == 5


def test_a_call_that_waits_holds_up_no_other(host: Host) -> None:
    host.hello()
    host.send(call("Later", 1) + call("Now", 3))
    assert host.receive()[0] == 3
    host.late[0].reply(HealthCheckResponse(status=9))
    stream, response = host.receive()
    assert (stream, HealthCheckResponse.decode(response.payload).status) == (1, 9)


@pytest.mark.parametrize(
    ("method", "service", "code", "said"),
    [
        ("Refused", "test", status.ABORTED, "not today"),
        ("Broken", "test", status.INTERNAL, "Broken: AttributeError: 'CheckRequest' object has no attribute 'absent'"),
        ("Absent", "test", status.UNIMPLEMENTED, "method test/Absent is not supported by this agent"),
        ("Now", "other", status.UNIMPLEMENTED, "service other is not known to this agent"),
    ],
)
def test_errors_are_answers_and_are_logged(
    host: Host, capfd: pytest.CaptureFixture[str], method: str, service: str, code: int, said: str
) -> None:
    host.hello()
    host.send(call(method, service=service))
    _, response = host.receive()
    assert response.status == frames.Status(code=code, message=said)
    assert '"request": "r1"' in capfd.readouterr().err
    host.send(call("Now"))
    assert host.receive()[0] == 1


def test_nothing_is_answered_before_a_hello(host: Host) -> None:
    host.send(call("Now"))
    assert host.is_silent()
    host.hello()


def test_a_hello_between_frames_may_be_followed_by_calls(host: Host) -> None:
    host.hello()
    host.send(HELLO + bytes(16) + call("Now", 3))
    answer = host.socket.recv(1 << 16)
    assert answer == HELLO_REPLY + bytes(16)
    assert host.receive()[0] == 3


@pytest.mark.parametrize("cut", [1, 9, 10, 11, 30])
def test_a_hello_in_the_middle_of_a_frame_begins_anew(host: Host, cut: int) -> None:
    host.hello()
    host.send(call("Now")[:cut])
    host.hello(b"n" * 16)
    host.send(call("Now", 7))
    assert host.receive()[0] == 7


def test_a_request_that_contains_a_hello_is_a_request(host: Host) -> None:
    request = frames.Request(service="test", method="Now", payload=CheckRequest(service="KATA-HI1" * 9).encode())
    frame = frames.encode(3, frames.REQUEST, request.encode())
    at = frame.index(HELLO)
    host.hello()
    host.send(frame[:at])
    host.send(frame[at:])
    assert host.receive()[0] == 3


def test_answers_to_an_earlier_conversation_are_dropped(host: Host) -> None:
    host.hello()
    host.send(call("Later"))
    host.hello()
    host.late[0].reply(HealthCheckResponse())
    assert host.is_silent()


def test_a_frame_that_is_too_long_is_answered(host: Host) -> None:
    host.hello()
    host.send((frames.MAX_PAYLOAD + 1).to_bytes(4, "big") + b"\0\0\0\x09\x01\0")
    stream, response = host.receive()
    assert stream == 9
    assert response.status
    assert response.status.code == status.RESOURCE_EXHAUSTED
