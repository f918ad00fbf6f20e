"""QMP over sockets, for a machine; answers and events go wrong where that was demanded.

Source of the wire format: docs/interop/qmp-spec.rst of QEMU.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from common.testing.demands import Demands, How
from common.testing.fake_qemu.machine import OBJECTS, PERIPHERALS, Machine, RefusalError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}
GUEST_TAKES_S = 0.02
"""How long the guest takes to let a device go when it does so by itself: it is never in the same moment."""


class Monitor:
    """Speaks for one machine to whoever connects."""

    def __init__(self, buses: dict[str, str], *, is_driven: bool) -> None:
        self._machine = Machine(buses, self._tell, is_driven=is_driven)
        self._writers: set[asyncio.StreamWriter] = set()
        self._demands = Demands()
        self._held: list[Callable[[], None]] = []
        self._transcript: list[str] = []
        self._commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "qmp_capabilities": lambda _: None,
            "query-status": self._machine.status,
            "stop": lambda _: self._machine.move("paused"),
            "cont": lambda _: self._resume(),
            "query-chardev": self._machine.list_chardevs,
            "chardev-add": self._machine.chardev_add,
            "chardev-remove": self._machine.chardev_remove,
            "ringbuf-read": lambda _: "",
            "qom-list": self._qom_list,
            "query-named-block-nodes": self._machine.named_nodes,
            "blockdev-add": self._machine.blockdev_add,
            "blockdev-del": self._machine.blockdev_del,
            "getfd": lambda _: None,
            "object-add": self._machine.object_add,
            "object-del": self._machine.object_del,
            "netdev_add": self._machine.netdev_add,
            "netdev_del": self._machine.netdev_del,
            "human-monitor-command": self._machine.info_network,
            "device_add": self._machine.device_add,
            "device_del": self._device_del,
            "x-query-virtio-status": self._machine.virtio_status,
            "x-looks": lambda _: self._machine.looks,
            "x-drive": self._machine.drive,
            "x-misbehave": self._misbehave,
            "x-release": self._release,
            "x-guest": self._guest,
            "x-let-go": lambda arguments: self._machine.let_go(arguments["id"]),
            "x-transcript": lambda _: self._transcript,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection until it is closed."""
        self._writers.add(writer)
        self._write(writer, GREETING)
        try:
            async for message in _messages(reader):
                self._take(writer, message)
        except ConnectionError:
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    def _take(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        name, arguments = message["execute"], message.get("arguments", {})
        if not name.startswith("x-"):
            self._transcript.append(f"-> {_said(name, arguments)}")
        demand = self._demands.next(name)
        if demand is How.REFUSED:
            answer: dict[str, Any] = _error(RefusalError("demanded"))
        else:
            answer = self._carry_out(name, arguments)
        if demand is How.ACTED_AND_REFUSED:
            answer = _error(RefusalError("demanded, after it was done"))
        answer |= {"id": message["id"]} if "id" in message else {}
        for _ in range(0 if demand is How.NEVER else 2 if demand is How.TWICE else 1):
            if demand is How.LATE:
                self._held.append(lambda: self._answer(writer, name, answer))
            else:
                self._answer(writer, name, answer)

    def _carry_out(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        command = self._commands.get(name)
        if command is None:
            return _error(RefusalError(f"The command {name} has not been found", "CommandNotFound"))
        try:
            result = command(arguments)
        except RefusalError as err:
            return _error(err)
        return {"return": {} if result is None else result}

    def _answer(self, writer: asyncio.StreamWriter, name: str, answer: dict[str, Any]) -> None:
        if not name.startswith("x-"):
            text = answer["error"]["desc"] if "error" in answer else "done"
            self._transcript.append(f"<- {text}")
        self._write(writer, answer)

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        demand = self._demands.next(event) if "device" in data else None
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        for _ in range(0 if demand is How.NEVER else 2 if demand is How.TWICE else 1):
            if "device" in data:
                self._transcript.append(f"** {event} {data['device']}")
            for writer in self._writers:
                self._write(writer, {"event": event, **({"data": data} if data else {}), "timestamp": stamp})

    def _write(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(message).encode() + b"\r\n")

    def _misbehave(self, arguments: dict[str, Any]) -> None:
        self._demands.add(arguments["what"], arguments["how"], arguments.get("times", 1))

    def _release(self, _: dict[str, Any]) -> None:
        held, self._held = self._held, []
        for answer in held:
            answer()

    def _guest(self, arguments: dict[str, Any]) -> None:
        self._machine.lets_go = arguments["lets-go"]
        self._let_go()

    def _resume(self) -> None:
        self._machine.move("running")
        asyncio.get_running_loop().call_later(GUEST_TAKES_S, self._let_go)

    def _device_del(self, arguments: dict[str, Any]) -> None:
        self._machine.device_del(arguments)
        asyncio.get_running_loop().call_later(GUEST_TAKES_S, self._let_go)

    def _let_go(self) -> None:
        for name in self._machine.leaving():
            self._machine.let_go(name)

    def _qom_list(self, arguments: dict[str, Any]) -> list[dict[str, str]]:
        if arguments["path"] == OBJECTS:
            return [{"name": name, "type": f"child<{kind}>"} for name, kind in self._machine.objects.items()]
        if arguments["path"] != PERIPHERALS:
            raise RefusalError(f"Device '{arguments['path']}' not found", "DeviceNotFound")
        return self._machine.peripherals(arguments)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield what a client says: JSON objects, with or without anything between them."""
    decoder, text = json.JSONDecoder(), ""
    while chunk := await reader.read(65536):
        text = (text + chunk.decode()).lstrip()
        while text:
            try:
                message, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break  # the rest of it is to come
            yield message
            text = text[end:].lstrip()


def _error(refusal: RefusalError) -> dict[str, Any]:
    return {"error": {"class": refusal.kind, "desc": refusal.text}}


def _said(name: str, arguments: dict[str, Any]) -> str:
    """Return a command as a line of the transcript: what it is about, and where."""
    shown = [str(arguments[key]) for key in ("node-name", "id", "bus", "addr") if key in arguments]
    return " ".join([name, *shown])
