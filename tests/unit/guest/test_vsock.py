"""vsock connections of the agent, over socket pairs: conversations and streams that begin and end."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from common.channel import HEADER, STREAM_NUMBER, StreamDecoder
from common.protocols.health import CheckRequest, HealthCheckResponse
from common.ttrpc import frames
from guest.agent.reactor import Reactor
from guest.agent.rpc import Call, Router
from guest.agent.streams import Input, Output, StreamPort, StreamPorts
from guest.agent.vsock import AgentConnection, UnnamedConnection

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAM = 0x100


class Host:
    """The host's end of a stream connection; the agent's side runs when asked to."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.streams = StreamPorts(lambda _: None)
        self.ended: list[str] = []
        self._agents: list[int] = []
        self.socket = self.connect()

    def connect(self) -> socket.socket:
        host, agent = socket.socketpair()
        host.setblocking(False)
        agent.setblocking(False)
        UnnamedConnection(self.reactor, agent.detach(), self.streams)
        return host

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)
        self.run()

    def run(self) -> None:
        """Let the agent handle all that has come."""
        is_idle = False

        def note() -> None:
            nonlocal is_idle
            is_idle = True

        while not is_idle:
            self.reactor.soon(note)
            self.reactor.run_once()

    def name(self) -> StreamPort:
        self.send(STREAM_NUMBER.pack(STREAM))
        assert self.socket.recv(100) == STREAM_NUMBER.pack(STREAM)
        return self.streams.get(STREAM)

    def output(self) -> int:
        """Attach a process's output; return the process's end."""
        source, end = os.pipe()
        Output(self.reactor, self.streams.get(STREAM), STREAM, source, lambda: self.ended.append("output"))
        return end

    def input(self) -> int:
        """Attach a process's input; return the process's end."""
        end, sink = os.pipe()
        Input(self.reactor, self.streams.get(STREAM), STREAM, sink)
        return end


@pytest.fixture
def host() -> Iterator[Host]:
    ends = Host()
    yield ends
    ends.socket.close()
    ends.run()
    assert ends.streams.connections == {}


def frame(payload: bytes) -> bytes:
    return HEADER.pack(STREAM, len(payload)) + payload


def test_a_number_that_comes_in_parts(host: Host) -> None:
    for byte in STREAM_NUMBER.pack(STREAM):
        host.send(bytes([byte]))
    assert host.socket.recv(100) == STREAM_NUMBER.pack(STREAM)


def test_a_number_that_is_taken_is_refused(host: Host) -> None:
    port = host.name()
    other = host.connect()
    other.sendall(STREAM_NUMBER.pack(STREAM))
    host.run()
    assert other.recv(100) == b""
    other.close()
    assert host.streams.get(STREAM) is port


def test_output_and_its_end(host: Host) -> None:
    host.name()
    process = host.output()
    os.write(process, b"said")
    host.run()
    os.close(process)
    host.run()
    assert host.socket.recv(100) == frame(b"said") + frame(b"")
    assert host.ended == ["output"]


def test_frames_are_whole_however_slowly_the_host_reads(host: Host) -> None:
    host.name()
    host.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    process = host.output()
    os.set_blocking(process, False)
    data, sent, received = os.urandom(1 << 20), 0, bytearray()
    decoder = StreamDecoder(STREAM)
    while len(received) < len(data):
        if sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += os.write(process, data[sent:])
        host.run()
        try:
            received += b"".join(decoder.feed(host.socket.recv(1000)))
        except BlockingIOError:
            continue
    assert received == data
    os.close(process)
    host.run()


def test_input_and_its_end(host: Host) -> None:
    host.name()
    process = host.input()
    host.send(frame(b"heard") + frame(b""))
    assert os.read(process, 100) == b"heard"
    assert os.read(process, 100) == b""
    os.close(process)
    host.send(frame(b"too late"))


def test_input_that_came_before_its_process_is_kept(host: Host) -> None:
    host.name()
    host.send(frame(b"ear")[:5])
    host.send(frame(b"ear")[5:])
    process = host.input()
    host.run()
    assert os.read(process, 100) == b"ear"
    os.close(process)


def test_a_host_that_closes_ends_both_directions(host: Host) -> None:
    host.name()
    reader, writer = host.input(), host.output()
    host.socket.close()
    host.run()
    assert os.read(reader, 100) == b""
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"nobody reads")
    assert host.ended == ["output"]
    for end in (reader, writer):
        os.close(end)


def test_a_conversation_needs_no_hello_and_ends_with_its_connection() -> None:
    late: list[Call] = []
    reactor = Reactor()
    router = Router({
        "test": {
            "Now": (CheckRequest, lambda _request, _call: HealthCheckResponse(status=7)),
            "Later": (CheckRequest, lambda _request, call: late.append(call)),
        }
    })  # fmt: skip
    host, agent = socket.socketpair()
    agent.setblocking(False)
    AgentConnection(reactor, agent.detach(), router)
    for stream, method in ((1, "Later"), (3, "Now")):
        host.sendall(frames.encode(stream, frames.REQUEST, frames.Request(service="test", method=method).encode()))
        reactor.run_once()
    (answer,) = frames.Decoder().feed(host.recv(1000))
    assert answer.stream == 3
    assert HealthCheckResponse.decode(frames.Response.decode(answer.payload or b"").payload).status == 7
    host.close()
    reactor.run_once()
    late[0].reply(HealthCheckResponse())
