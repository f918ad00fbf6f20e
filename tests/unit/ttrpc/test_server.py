"""The ttrpc server and client of the host, against one another and against bytes of our own."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import TYPE_CHECKING, ParamSpec

import pytest

from common import status
from common.errors import DeadlineError, ExhaustedError, KataError, NotFoundError, UnavailableError, UnsupportedError
from common.protobuf import Message, string
from common.protocols.task import Empty
from common.ttrpc import frames
from common.ttrpc import server as server_module
from common.ttrpc.client import MAX_MESSAGE, TtrpcClient
from common.ttrpc.server import TtrpcServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

P = ParamSpec("P")


class Text(Message):
    text: str = string(1)


class Service:
    """Echoes; fails; holds calls until it is told to go on."""

    def __init__(self, group: asyncio.TaskGroup, path: Path) -> None:
        self.path = path
        self.held = 0
        self.finished = 0
        self.has_held = asyncio.Event()
        self.is_full = asyncio.Event()
        self.may_go_on = asyncio.Event()
        methods = {
            ("test.Echo", "Say"): (Text, self._say),
            ("test.Echo", "Hold"): (Text, self._hold),
            ("test.Echo", "Miss"): (Text, self._miss),
            ("test.Echo", "Break"): (Text, self._break),
            ("test.Echo", "Refuse"): (Text, self._refuse),
            ("test.Echo", "Grow"): (Text, self._grow),
        }
        self.server = TtrpcServer(methods, group)

    async def listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        listener.setblocking(False)
        await self.server.listen(listener)

    async def connect(self) -> TtrpcClient:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_unix_connection(lambda: TtrpcClient("the test"), str(self.path))
        return client

    async def _say(self, request: Text) -> Text:
        return request

    async def _hold(self, request: Text) -> Text:
        self.held += 1
        if self.held == server_module.MAX_CALLS:
            self.is_full.set()
        self.has_held.set()
        await self.may_go_on.wait()
        self.finished += 1
        return request

    async def _miss(self, request: Text) -> Text:
        raise NotFoundError(f"no {request.text}", hint="look elsewhere")

    async def _refuse(self, request: Text) -> Text:
        raise KataError(request.text)

    async def _break(self, request: Text) -> Text:
        raise ZeroDivisionError(request.text)

    async def _grow(self, _: Text) -> Text:
        return Text(text="x" * (frames.MAX_PAYLOAD + 1))


def service_test(test: Callable[[Service], Awaitable[None]]) -> Callable[[Path], None]:
    """Run an asynchronous test against a service of its own."""

    async def run(path: Path) -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            service = Service(group, path)
            await service.listen()
            await test(service)
            service.may_go_on.set()
            service.server.close()

    @functools.wraps(test)
    def wrapper(tmp_path: Path) -> None:
        asyncio.run(run(tmp_path / "s"))

    del wrapper.__wrapped__  # pytest would take the parameter for a fixture
    return wrapper


async def say(client: TtrpcClient, text: str, method: str = "Say") -> str:
    return (await client.call("test.Echo", method, Text(text=text), Text, timeout_s=30)).text


@service_test
async def test_calls_are_answered(service: Service) -> None:
    client = await service.connect()
    assert await asyncio.gather(*(say(client, str(number)) for number in range(50))) == [str(n) for n in range(50)]
    client.close()


@service_test
async def test_a_call_that_waits_holds_no_other(service: Service) -> None:
    client = await service.connect()
    async with asyncio.TaskGroup() as group:
        held = group.create_task(say(client, "held", "Hold"))
        await service.has_held.wait()
        assert await say(client, "quick") == "quick"
        assert not held.done()
        service.may_go_on.set()
        assert await held == "held"
    client.close()


@service_test
async def test_a_peers_error_is_bounded_and_cannot_command_a_terminal(service: Service) -> None:
    client = await service.connect()
    with pytest.raises(KataError) as failure:
        await say(client, "no\n\x1b]0;owned\x07\x1b[2J" + "x" * 100_000, "Refuse")
    assert failure.value.message.startswith("no\n\N{REPLACEMENT CHARACTER}]0;owned")
    assert "\x1b" not in failure.value.message
    assert len(failure.value.message) == MAX_MESSAGE
    client.close()


@service_test
async def test_errors_keep_their_code_and_their_hint(service: Service) -> None:
    client = await service.connect()
    with pytest.raises(NotFoundError, match=r"no bread \(look elsewhere\)"):
        await say(client, "bread", "Miss")
    with pytest.raises(UnsupportedError, match=r"method Frob of service test\.Echo"):
        await say(client, "", "Frob")
    client.close()


@service_test
async def test_a_bug_is_answered_and_ends_nothing(service: Service) -> None:
    client = await service.connect()
    with pytest.raises(KataError, match="internal error: ZeroDivisionError: zero"):
        await say(client, "zero", "Break")
    assert await say(client, "still here") == "still here"
    client.close()


@service_test
async def test_a_client_that_stops_waiting_stops_only_the_waiting(service: Service) -> None:
    client = await service.connect()
    with pytest.raises(DeadlineError, match=r"the test did not answer Hold within 0\.01 s"):
        await client.call("test.Echo", "Hold", Text(text="x"), Text, timeout_s=0.01)
    await service.has_held.wait()
    client.close()
    again = await service.connect()
    service.may_go_on.set()
    assert await say(again, "again") == "again"
    assert service.finished == 1
    again.close()


@service_test
async def test_a_connection_that_is_lost_fails_the_calls_on_it(service: Service) -> None:
    client = await service.connect()

    async def lose() -> None:
        await service.has_held.wait()
        service.server.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(lose())
        with pytest.raises(UnavailableError, match="connection to the test was lost"):
            await say(client, "x", "Hold")
    with pytest.raises(UnavailableError, match="no connection to the test"):
        await say(client, "x")


@service_test
async def test_calls_are_bounded(service: Service) -> None:
    client = await service.connect()
    async with asyncio.TaskGroup() as group:
        for _ in range(server_module.MAX_CALLS):
            group.create_task(say(client, "x", "Hold"))
        await service.is_full.wait()
        with pytest.raises(ExhaustedError, match="calls are in flight"):
            await say(client, "one too many")
        service.may_go_on.set()
    assert await say(client, "again") == "again"
    client.close()


@service_test
async def test_a_reply_that_is_too_long_is_an_error(service: Service) -> None:
    client = await service.connect()
    with pytest.raises(ExhaustedError, match="reply of"):
        await say(client, "", "Grow")
    client.close()


async def exchange(service: Service, *requests: bytes, answers: int) -> dict[int, frames.Response]:
    """Send frames of our own and read so many answers."""
    reader, writer = await asyncio.open_unix_connection(str(service.path))
    for request in requests:
        writer.write(request)
    decoder = frames.Decoder()
    found: dict[int, frames.Response] = {}
    while len(found) < answers:
        for frame in decoder.feed(await reader.read(65536)):
            found[frame.stream] = frames.Response.decode(frame.payload or b"")
    writer.close()
    await writer.wait_closed()
    return found


def request_frame(stream: int, text: str = "x") -> bytes:
    request = frames.Request(service="test.Echo", method="Say", payload=Text(text=text).encode())
    return frames.encode(stream, frames.REQUEST, request.encode())


def code(response: frames.Response) -> int:
    return response.status.code if response.status else status.OK


@service_test
async def test_stream_numbers_are_odd_and_rise(service: Service) -> None:
    sent = [request_frame(3), request_frame(2), request_frame(1), request_frame(5)]
    answers = await exchange(service, *sent, answers=4)
    wrong = status.INVALID_ARGUMENT
    assert {stream: code(answer) for stream, answer in answers.items()} == {3: 0, 2: wrong, 1: wrong, 5: 0}


@service_test
async def test_malformed_requests_are_refused_one_by_one(service: Service) -> None:
    nonsense = frames.encode(1, frames.REQUEST, b"\xff\xff\xff")
    bad_body = frames.Request(service="test.Echo", method="Say", payload=b"\x0a\xff")
    sent = [nonsense, frames.encode(3, frames.REQUEST, bad_body.encode()), frames.encode(4, 9, b"?"), request_frame(5)]
    answers = await exchange(service, *sent, answers=3)
    wrong = status.INVALID_ARGUMENT
    assert {stream: code(answer) for stream, answer in answers.items()} == {1: wrong, 3: wrong, 5: 0}


@service_test
async def test_a_request_that_is_too_long_is_skipped_and_answered(service: Service) -> None:
    size = frames.MAX_PAYLOAD + 1
    header = size.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes((frames.REQUEST, 0))
    answers = await exchange(service, header + bytes(size), request_frame(3), answers=2)
    assert {stream: code(answer) for stream, answer in answers.items()} == {1: status.RESOURCE_EXHAUSTED, 3: 0}


@service_test
async def test_what_a_server_must_not_send_is_dropped(service: Service) -> None:
    client = await service.connect()
    client.data_received(frames.encode(99, frames.RESPONSE, b"") + frames.encode(1, frames.DATA, b"x"))
    assert await say(client, "fine") == "fine"
    client.close()


def test_an_answer_that_is_no_message_is_told() -> None:
    with pytest.raises(KataError, match="bytes that are no reply"):
        TtrpcClient("the test")._read("Say", b"\xff", Empty)
