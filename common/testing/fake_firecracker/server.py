"""HTTP as micro_http speaks it, for a machine; answers go wrong where that was demanded.

Source: src/firecracker/src/api_server of Firecracker; docs/api_requests.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from common.testing.demands import Demands, How
from common.testing.fake_firecracker.machine import Machine, RefusalError

if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL_SOCKET = "control"
_NAMED = frozenset({"drives", "network-interfaces"})
"""Kinds of resources of which there are several, each with an id."""
_MAX_BODY = 51200


class _Request(NamedTuple):
    method: str
    path: str
    body: dict[str, Any]

    @property
    def what(self) -> str:
        """Return the method and the first part of the path, by which demands name it."""
        return f"{self.method} /{self.path.split('/')[1]}"

    def __str__(self) -> str:
        said = self.body.get("path_on_host", self.body.get("state", ""))
        return f"{self.method} {self.path} {said}".strip()


class Server:
    """Speaks for one machine.

    Args:
        machine: which.
        log: takes what is logged at every level.
        count: takes what is written into the file of the counters.
    """

    def __init__(self, machine: Machine, log: Callable[[str], None], count: Callable[[str], None]) -> None:
        self._machine = machine
        self._log = log
        self._demands = Demands()
        self._held: list[Callable[[], None]] = []
        self._transcript: list[str] = []
        self._routes: dict[tuple[str, str], Callable[[str, dict[str, Any]], dict[str, Any] | None]] = {
            ("GET", ""): lambda _name, _body: machine.info(),
            ("GET", "version"): lambda _name, _body: {"firecracker_version": machine.info()["vmm_version"]},
            ("GET", "vm"): lambda _name, _body: machine.config(),
            **{("PUT", name): machine.set for name in ("boot-source", "machine-config", "vsock", "entropy")},
            ("PUT", "actions"): machine.act,
            ("PATCH", "vm"): machine.move,
            ("PUT", "snapshot"): machine.snapshot,
            ("PUT", "drives"): machine.put_drive,
            ("PATCH", "drives"): machine.patch_drive,
            ("DELETE", "drives"): machine.delete_drive,
            ("PUT", "network-interfaces"): machine.put_nic,
            ("DELETE", "network-interfaces"): machine.delete_nic,
        }
        self._orders: dict[str, Callable[..., object]] = {
            "misbehave": self._demands.add,
            "release": self._release,
            "rescan": lambda: machine.guest.rescan(machine.slots()),
            "remove": machine.guest.remove,
            "panic": self._panic,
            "count": count,
            "log": log,
            "guest": machine.seen,
            "memory": lambda: machine.memory,
            "config": machine.config,
            "has": machine.devices,
            "transcript": lambda: self._transcript,
        }

    async def serve(self, api_socket: str) -> None:
        """Answer for ever, on the API and on the control socket."""
        control = await asyncio.start_unix_server(self._control, CONTROL_SOCKET)
        async with control, await asyncio.start_unix_server(self._serve, api_socket):
            await asyncio.Event().wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _read(reader)) is not None:
                self._take(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        except ValueError as err:
            _write(writer, 400, {"error": f"{err}\nAll previous unanswered requests will be dropped."})
        finally:
            if not self._held:
                writer.close()

    def _take(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        self._transcript.append(f"-> {request}")
        demand = self._demands.next(request.what)
        status, body = (400, _fault("demanded")) if demand is How.REFUSED else self._carry_out(request)
        if demand is How.ACTED_AND_REFUSED:
            status, body = 400, _fault("demanded, after it was done")
        if demand is How.NEVER:
            return
        if demand is How.LATE:
            self._held.append(lambda: self._answer(writer, status, body))
        else:
            self._answer(writer, status, body)

    def _carry_out(self, request: _Request) -> tuple[int, dict[str, Any] | None]:
        try:
            body = self._result(request)
        except RefusalError as err:
            return 400, _fault(str(err))
        return (204, None) if body is None else (200, body)

    def _result(self, request: _Request) -> dict[str, Any] | None:
        kind, _, rest = request.path.strip("/").partition("/")
        handle = self._routes.get((request.method, kind))
        if handle is None:
            raise RefusalError(f"Invalid request method and/or path: {request.method} {kind}.")
        name = _checked(rest) if kind in _NAMED else rest if kind == "snapshot" else kind
        return handle(name, request.body)

    def _answer(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any] | None) -> None:
        said = body["fault_message"] if status == 400 and body else "done"
        if status == 400:
            self._log(f"ERROR] Received Error. Status code: 400 Bad Request. Message: {said}")
        self._transcript.append(f"<- {said}")
        _write(writer, status, body)

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            order = json.loads(line)
            result = self._orders[order.pop("demand")](**order)
            writer.write(json.dumps(result).encode() + b"\n")
        writer.close()

    def _release(self) -> None:
        held, self._held = self._held, []
        for answer in held:
            answer()

    def _panic(self) -> None:
        print("Kernel panic - not syncing: demanded", flush=True)  # noqa: T201 - the guest's console
        os._exit(0)


async def _read(reader: asyncio.StreamReader) -> _Request | None:
    line = (await reader.readline()).decode()
    if not line:
        return None
    method, path, _ = line.split(" ")
    length = 0
    while header := (await reader.readline()).decode().strip():
        name, _, value = header.partition(":")
        if name.lower() == "content-length":
            length = int(value)
    if length > _MAX_BODY:
        raise ValueError(
            f"Request payload with size {length} is larger than the limit of {_MAX_BODY} allowed by server."
        )
    return _Request(method, path, json.loads(await reader.readexactly(length)) if length else {})


def _write(writer: asyncio.StreamWriter, status: int, body: dict[str, Any] | None) -> None:
    if writer.is_closing():
        return
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    content = b"" if body is None else json.dumps(body).encode()
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}\r\n".encode() + content)


def _checked(drive_id: str) -> str:
    if not drive_id:
        raise RefusalError("The ID cannot be empty.")
    if not all(char == "_" or char.isalnum() for char in drive_id):
        raise RefusalError("API Resource IDs can only contain alphanumeric characters and underscores.")
    return drive_id


def _fault(said: str) -> dict[str, Any]:
    return {"fault_message": said}
