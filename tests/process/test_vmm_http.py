"""The HTTP client of the hypervisors' APIs, against a server that says exactly what the test wants."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import DeadlineError, HypervisorError, KataError, UnavailableError, UsageError
from common.testing.isolation import in_event_loop
from procs.vmm_manager.drivers import http
from procs.vmm_manager.drivers.http import Answer, UnixHttp, decoded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Server:
    """Answers each connection with the next of some bytes, and remembers what it was sent."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.most_at_once = self.at_once = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        self.requests.append(head + await reader.readexactly(length))
        await self.go_on.wait()
        answer = self.answers.pop(0)
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        self.at_once -= 1
        writer.close()


@asynccontextmanager
async def serving(directory: Path, *answers: bytes | None) -> AsyncIterator[tuple[UnixHttp, Server]]:
    server = Server(*answers)
    async with await asyncio.start_unix_server(server.serve, directory / "api"):
        yield UnixHttp(str(directory), "api", "the VMM"), server


OK = b'HTTP/1.1 200 \r\nServer: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"a": 10}'
EMPTY = b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n"


@in_event_loop
async def test_asks_and_is_answered(run_dir: Path) -> None:
    async with serving(run_dir, OK, EMPTY, b"HTTP/1.1 100 Continue\r\n\r\n" + EMPTY) as (client, server):
        assert decoded(await client.request("GET", "/info", timeout_s=5)) == {"a": 10}
        assert await client.request("PUT", "/do", {"id": "x"}, timeout_s=5) == Answer(204, b"")
        assert (await client.request("PUT", "/do", timeout_s=5)).status == 204
        get, put, bare = server.requests
        assert get.startswith(b"GET /info HTTP/1.1\r\n")
        assert b"Content-Length" not in get, "a request that has no body must have none"
        assert put.endswith(b"Content-Length: 11\r\n\r\n" + b'{"id": "x"}')
        assert b"Content-Length" not in bare


@in_event_loop
async def test_requests_wait_for_one_another(run_dir: Path) -> None:
    async with serving(run_dir, *[EMPTY] * 20) as (client, server):
        await asyncio.gather(*(client.request("PUT", f"/{n}", timeout_s=20) for n in range(20)))
        assert server.most_at_once == 1


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", "went away"),
        (b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{", "went away"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", "an answer of 99999999 bytes"),
        (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", "an answer of -1 bytes"),
        (b"SSH-2.0-x\r\n", "is not HTTP"),
        (b"HTTP/1.1 abc \r\n\r\n", "invalid literal"),
        (b"HTTP/1.1 200 \r\n" + b"x" * 20000 + b"\r\n", "a header does not end"),
        (b"HTTP/1.1 200 \r\n" + b"x: y\r\n" * 5000 + b"\r\n", "headers do not end"),
    ],
)
@in_event_loop
async def test_what_is_no_answer_leaves_open_what_happened(run_dir: Path, said: bytes, error: str) -> None:
    async with serving(run_dir, said) as (client, _):
        with pytest.raises(HypervisorError, match=error):
            await client.request("PUT", "/do", timeout_s=5)


@in_event_loop
async def test_a_late_answer_is_nobodys(run_dir: Path) -> None:
    async with serving(run_dir, None, OK) as (client, server):
        with pytest.raises(DeadlineError, match=r"the VMM did not answer PUT /do within 0\.05 s"):
            await client.request("PUT", "/do", timeout_s=0.05)
        assert decoded(await client.request("GET", "/info", timeout_s=5)) == {"a": 10}
        assert len(server.requests) == 2


@in_event_loop
async def test_what_was_not_sent_is_said_so(run_dir: Path) -> None:
    refusals: list[KataError] = []
    client = UnixHttp(str(run_dir), "nobody", "the VMM")
    for body in (None, "x" * http.MAX_REQUEST):
        with pytest.raises(KataError) as refused:
            await client.request("PUT", "/do", body, timeout_s=5)
        refusals.append(refused.value)
    assert [type(error) for error in refusals] == [UnavailableError, UsageError]


def test_an_error_may_be_text() -> None:
    assert decoded(Answer(500, b'["a","b"]')) == ["a", "b"]
    assert decoded(Answer(500, b"not JSON")) == "not JSON"
    assert decoded(Answer(204, b"")) is None
