"""HTTP over a Unix socket for a machine, one request at a time, and a stream of events; both go wrong on demand.

Source: ``vmm/src/api/http`` of v53.0 and its library micro_http.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.testing.demands import Demands, How
from common.testing.fake_cloud_hypervisor.connection import Connection
from common.testing.fake_cloud_hypervisor.machine import Machine
from common.testing.fake_cloud_hypervisor.totals import BUSY, RefusalError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

GUEST_TAKES_S = 0.02
"""How long the guest takes to let a device go when it does so by itself: it is never in the same moment."""

_MAX_BODY = 51200
_MAX_CONNECTIONS = 10
_QUESTIONS = frozenset({"vm.info", "vm.counters", "vmm.ping"})
_UNDONE: dict[How | None, tuple[int, list[str]]] = {
    How.REFUSED: (500, ["Error from API", "demanded"]),
    How.BUSY: (429, [*BUSY]),
}
"""What is answered without anything being done."""
_NEED_BODY = frozenset(
    {
        "vm.create",
        "vm.add-device",
        "vm.add-disk",
        "vm.add-fs",
        "vm.add-net",
        "vm.add-pmem",
        "vm.remove-device",
        "vm.resize",
        "vm.snapshot",
        "vm.restore",
    }
)


class Server:
    """Speaks for one machine.

    Args:
        version: whose.
        events_fd: where events are written, or -1.
        closing_takes_s: how long a file stays open after its device is told gone.
    """

    def __init__(self, version: str, events_fd: int, closing_takes_s: float) -> None:
        self._machine = Machine(version, self._tell, closing_takes_s)
        self._events_fd = events_fd
        self._demands = Demands()
        self._held: list[Callable[[], Awaitable[None]]] = []
        self._transcript: list[str] = []
        self._turn = asyncio.Lock()
        self._connections = 0
        self._guest: set[asyncio.Task[None]] = set()
        self._began = time.monotonic_ns()
        self._endpoints: dict[str, Callable[[dict[str, Any]], Any]] = {
            "vmm.ping": lambda _: {
                "build_version": f"v{version}",
                "version": version,
                "pid": os.getpid(),
                "features": ["kvm"],
            },
            "vm.info": lambda _: self._machine.info(),
            "vm.counters": lambda _: {},
            "vm.create": self._machine.create,
            "vm.boot": lambda _: self._machine.boot(),
            "vm.pause": lambda _: self._machine.pause(),
            "vm.resume": lambda _: self._resume(),
            "vm.resize": self._resize,
            "vm.snapshot": self._machine.snapshot,
            "vm.restore": self._machine.restore,
            "vm.add-device": lambda body: self._machine.add("vfio", body),
            "vm.add-disk": lambda body: self._machine.add("disk", body),
            "vm.add-fs": lambda body: self._machine.add("fs", body),
            "vm.add-pmem": lambda body: self._machine.add("pmem", body),
            "vm.add-net": lambda body: self._machine.add("net", body),
            "vm.remove-device": lambda body: self._remove(str(body["id"])),
        }
        self._control: dict[str, Callable[..., Awaitable[Any]]] = {
            "misbehave": self._misbehave,
            "release": self._release,
            "guest": self._set_guest,
            "let_go": self._machine.let_go,
            "garble": self._garble,
            "tell": self._tell_event,
            "print": self._print,
            "transcript": self._get_transcript,
            "has": self._get_has,
            "totals": self._get_totals,
            "memory": self._get_memory,
        }

    async def serve(self, listener: socket.socket) -> None:
        """Take connections for ever, and answer on each until it is closed."""
        listener.setblocking(False)
        async with asyncio.TaskGroup() as connections:
            while True:
                connected, _ = await asyncio.get_running_loop().sock_accept(listener)
                connected.setblocking(False)
                connections.create_task(self._serve(connected))

    async def _serve(self, connected: socket.socket) -> None:
        self._connections += 1
        try:
            with Connection(connected) as connection:
                if self._connections > _MAX_CONNECTIONS:
                    await _write(connection, 503, {"error": "Too many open connections"})
                    return
                while True:
                    await self._take(connection, (await connection.read_until(b"\r\n\r\n")).decode())
        except (OSError, EOFError):
            return
        finally:
            self._connections -= 1

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry out what a test demands."""
        while line := await reader.readline():
            demand = json.loads(line)
            answer = await self._control[demand.pop("demand")](**demand)
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    async def _take(self, connection: Connection, head: str) -> None:
        method, path, _ = head.split(" ", 2)
        lengths = [line.partition(":")[2] for line in head.lower().splitlines() if line.startswith("content-length:")]
        length = int(lengths[0]) if lengths else 0
        if length > _MAX_BODY:
            reason = f"Request payload with size {length} is larger than the limit of {_MAX_BODY}"
            await _write(connection, 400, {"error": reason})
            return
        text = await connection.read_exactly(length)
        async with self._turn:
            await self._answer(connection, method, path.removeprefix("/api/v1/"), text)

    async def _answer(self, connection: Connection, method: str, what: str, text: bytes) -> None:
        is_question = what in _QUESTIONS
        if not is_question:
            self._transcript.append(f"-> {what}{_said(text)}")
        demand = self._demands.next(what)
        if demand in _UNDONE:
            status, said = _UNDONE[demand]
        else:
            status, said = await self._carry_out(method, what, text, connection)
        if demand is How.ACTED_AND_REFUSED:
            status, said = 500, ["Error from API", "demanded, after it was done"]

        async def send() -> None:
            if not is_question:
                self._transcript.append(
                    f"<- {said[-1] if status >= 400 else _said(json.dumps(said)).strip() or 'accepted'}"
                )
            await _write(connection, status, said)

        if demand is How.LATE:
            self._held.append(send)
        elif demand is not How.NEVER:
            await send()

    async def _carry_out(self, method: str, what: str, text: bytes, connection: Connection) -> tuple[int, Any]:
        endpoint = self._endpoints.get(what)
        if endpoint is None:
            return 404, ["Not Found"]
        if (method == "GET") != (what in _QUESTIONS) or bool(text) != (what in _NEED_BODY):
            return 400, ["Bad Request"]
        try:
            if what == "vm.info":
                answer = endpoint({})
            else:
                async with self._machine.busy:
                    answer = endpoint({**json.loads(text or b"{}"), **_beside(connection)})
        except RefusalError as err:
            return err.status, err.reasons
        if what.startswith("vm.add-") and what != "vm.add-device":
            self._tell("virtio-device", "activated", {"id": answer["id"]})
        return (204, None) if answer is None else (200, answer)

    def _remove(self, name: str) -> None:
        self._machine.remove(name)
        self._let_go()

    def _resize(self, body: dict[str, Any]) -> None:
        self._machine.resize(body)
        self._let_go()

    def _resume(self) -> None:
        self._machine.resume()
        self._let_go()

    def _let_go(self) -> None:
        """Have the guest let go what it was asked to, in a while."""
        asyncio.get_running_loop().call_later(GUEST_TAKES_S, self._let_go_now)

    def _let_go_now(self) -> None:
        if self._machine.lets_go and self._machine.state == "Running":
            if self._machine.totals is not None:
                self._machine.totals.follow()
            for name in sorted(self._machine.leaving):
                task = asyncio.get_running_loop().create_task(self._machine.let_go(name))
                self._guest.add(task)
                task.add_done_callback(self._guest.discard)

    async def _misbehave(self, what: str, how: str, times: int = 1) -> None:
        self._demands.add(what, how, times)

    async def _get_transcript(self) -> list[str]:
        return self._transcript

    async def _get_has(self) -> tuple[list[str], list[str]]:
        return self._machine.has()

    async def _get_totals(self) -> tuple[int, int]:
        assert self._machine.totals is not None
        return self._machine.totals.vcpus, self._machine.totals.memory

    async def _get_memory(self) -> tuple[str, str]:
        return self._machine.memory, self._machine.memory_mode

    async def _release(self) -> None:
        held, self._held = self._held, []
        for send in held:
            await send()

    async def _set_guest(self, *, lets_go: bool) -> None:
        self._machine.lets_go = lets_go
        self._let_go_now()

    async def _tell_event(self, source: str, name: str) -> None:
        asyncio.get_running_loop().call_soon(self._tell, source, name, None)  # after the answer: it may be the last

    async def _print(self, text: str) -> None:
        with suppress(BlockingIOError):  # what does not fit is lost, as the real one loses it
            os.write(sys.stdout.fileno(), text.encode())

    async def _garble(self) -> None:
        self._write_event('{\n  "timestamp": {\n    "secs": 1,\n    "na')

    def _tell(self, source: str, name: str, properties: dict[str, str] | None) -> None:
        demand = self._demands.next(name)
        since = time.monotonic_ns() - self._began
        stamp = {"secs": since // 10**9, "nanos": since % 10**9}
        record = {"timestamp": stamp, "source": source, "event": name, "properties": properties}
        for _ in range(0 if demand is How.NEVER else 2 if demand is How.TWICE else 1):
            if name == "device-removed":
                self._transcript.append(f"** {name} {(properties or {})['id']}")
            self._write_event(json.dumps(record, indent=2) + "\n\n")

    def _write_event(self, text: str) -> None:
        if self._events_fd >= 0:
            with suppress(BlockingIOError):
                os.write(self._events_fd, text.encode())


def _said(text: bytes | str) -> str:
    """Return what of a body is worth telling: which device, or which file."""
    body = json.loads(text) if text else None
    if not isinstance(body, dict):
        return ""
    parts = (
        body.get("desired_vcpus"),
        body.get("desired_ram"),
        body.get("id"),
        Path(str(body.get("path") or "")).name,
        body.get("tag"),
        body.get("mac"),
        body.get("bdf"),
    )
    return " " + " ".join(str(part) for part in parts if part)


def _beside(connection: Connection) -> dict[str, list[int]]:
    """Return what came beside a body and belongs into it."""
    fds = connection.take_fds()
    return {"fds": fds} if fds else {}


async def _write(connection: Connection, status: int, said: Any) -> None:  # noqa: ANN401 - JSON
    head = f"HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
    text = "" if said is None else json.dumps(said)
    about = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
    await connection.write(f"{head}{about}\r\n{text}".encode())
