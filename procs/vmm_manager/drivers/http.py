"""HTTP/1.1 as hypervisors speak it: over a Unix socket in the VM's directory, small, one request at a time.

The servers behind it are alike (``micro_http`` of Firecracker, which Cloud Hypervisor uses too): one thread that takes
requests in turn, ten connections at most, bodies of at most 51200 bytes, no chunked bodies, and bytes after a request
count as an error. So a VM's requests follow one another here already, each on a connection of its own: an answer that
comes too late cannot be taken for the next one's.

What a caller must know after a failure is whether the request may have acted. :class:`UnavailableError` means that it
was not sent; everything else leaves it open, and the hypervisor is asked.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import DeadlineError, HypervisorError, UnavailableError, UsageError
from procs.vmm_manager.drivers.spawn import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

MAX_REQUEST = 51200
"""Bytes of a request's body that every version takes (``HTTP_MAX_PAYLOAD_SIZE`` of micro_http)."""
MAX_ANSWER = 1 << 20
"""Bytes of an answer's body that are read."""
_MAX_HEAD = 8192


class Answer(NamedTuple):
    """An answer: its status, and its body, or nothing if it has none."""

    status: int
    body: bytes


class UnixHttp:
    """The server behind one socket.

    Args:
        directory: the VM's directory.
        name: of the socket there.
        peer: what the server is called in messages.
    """

    def __init__(self, directory: str, name: str, peer: str) -> None:
        self._directory = directory
        self._name = name
        self._peer = peer
        self._turn = asyncio.Lock()

    async def request(
        self, method: str, path: str, body: object = None, *, timeout_s: float, fds: Sequence[int] = ()
    ) -> Answer:
        """Send a request and return its answer, whatever its status.

        Args:
            method: for example ``PUT``.
            path: of the resource.
            body: becomes JSON; None sends no body.
            timeout_s: how long it may take once it is this request's turn.
            fds: descriptors that go beside it (SCM_RIGHTS, unix(7)); the server gets its own.

        Raises:
            UsageError: the body is larger than the server takes; nothing was sent.
            UnavailableError: nobody listens; nothing was sent.
            DeadlineError: no answer in time.
            HypervisorError: the connection ended, or what came is no answer.
        """
        sent = _encoded(method, path, body)
        what = f"{method} {path}"
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._exchange(sent, fds)
            except TimeoutError as err:
                raise DeadlineError(f"{self._peer} did not answer {what} within {timeout_s:g} s") from err
            except (OSError, EOFError, ValueError) as err:
                raise HypervisorError(f"{self._peer} went away before it answered {what}: {err}") from err

    async def _exchange(self, sent: bytes, fds: Sequence[int]) -> Answer:
        try:
            connection = connect(self._directory, self._name)
        except OSError as err:
            raise UnavailableError(f"{self._peer} does not listen: {err.strerror}") from err
        rest = _begun(connection, sent, fds)
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_MAX_HEAD)
        with closing(writer):
            writer.write(rest)
            await writer.drain()
            return await _answer(reader)


def _begun(connection: socket.socket, sent: bytes, fds: Sequence[int]) -> bytes:
    """Send what descriptors go with; return the rest."""
    if not fds:
        return sent
    try:
        return sent[socket.send_fds(connection, [sent], fds) :]
    except BaseException:
        connection.close()
        raise


def _encoded(method: str, path: str, body: object) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    content = json.dumps(body).encode()
    if len(content) > MAX_REQUEST:
        raise UsageError(f"{method} {path}: {len(content)} bytes are more than the hypervisor takes ({MAX_REQUEST})")
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


async def _answer(reader: asyncio.StreamReader) -> Answer:
    """Read an answer; one that only says "go on" (100) is followed by the real one (RFC 9110, 15.2)."""
    version, _, rest = (await _line(reader)).partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"{version[:20]!r} is not HTTP")
    status, length = int(rest.partition(" ")[0]), 0
    async for name, value in _headers(reader):
        if name == "content-length":
            length = int(value)
    if status == 100:
        return await _answer(reader)
    if not 0 <= length <= MAX_ANSWER:
        raise ValueError(f"an answer of {length} bytes")
    return Answer(status, await reader.readexactly(length))


async def _headers(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, str]]:
    read = 0
    while line := await _line(reader):
        read += len(line)
        if read > _MAX_HEAD:
            raise ValueError("an answer's headers do not end")
        name, _, value = line.partition(":")
        yield name.strip().lower(), value.strip()


async def _line(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.readuntil(b"\r\n"))[:-2].decode("ascii", "replace")
    except asyncio.LimitOverrunError as err:
        raise ValueError("a header does not end") from err


def decoded(answer: Answer) -> Any:  # noqa: ANN401 - JSON of the hypervisor's choosing
    """Return an answer's body as what its JSON says, or as text if it is none; None without a body."""
    if not answer.body:
        return None
    try:
        return json.loads(answer.body)
    except ValueError:
        return answer.body.decode("utf-8", "replace")
