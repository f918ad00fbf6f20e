"""Speaking QMP to one QEMU: bounded commands, our errors, every event to one handler.

Commands are matched to replies by id, so one that we stop waiting for does not shift the others. A command whose
deadline passed may still take effect: the caller asks QEMU what is true.
Source: QEMU's docs/interop/qmp-spec.rst; the client is the qemu.qmp package.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

from common.errors import DeadlineError, HypervisorError, NotFoundError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

COMMAND_TIMEOUT_S = 10.0


class Qmp:
    """One connection to one QEMU."""

    def __init__(self, name: str) -> None:
        self._client = QMPClient(name)

    async def connect(self, connection: socket.socket) -> str:
        """Negotiate on a connected socket; return QEMU's version.

        Raises:
            HypervisorError: what is at the other end is no QEMU, or it went away.
        """
        try:
            await self._client.connect(connection)
        except QMPError as err:
            raise HypervisorError(f"QEMU's monitor does not answer: {err}") from err
        greeting = self._client.greeting
        if greeting is None:
            raise HypervisorError("QEMU's monitor sent no greeting")
        version = greeting.QMP.version["qemu"]
        if not isinstance(version, dict):
            raise HypervisorError(f"QEMU's monitor names no version: {version!r}")
        return ".".join(str(version[part]) for part in ("major", "minor", "micro"))

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON of QEMU's choosing
        """Run a command and return its result.

        Raises:
            NotFoundError: QEMU knows no such device.
            HypervisorError: QEMU refused, with its own words, or went away.
            DeadlineError: no answer; whether it took effect must be asked.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except TimeoutError as err:
            raise DeadlineError(f"QEMU did not answer {command} within {COMMAND_TIMEOUT_S:g} s") from err
        except ExecuteError as err:
            kind = NotFoundError if err.error_class == "DeviceNotFound" else HypervisorError
            raise kind(f"QEMU refused {command}: {err}") from err
        except (ExecInterruptedError, StateError) as err:
            raise HypervisorError(f"QEMU went away before it answered {command}") from err

    async def follow(self, handle: Callable[[str, dict[str, Any]], Awaitable[None]]) -> None:
        """Hand each event's name and data to a handler, for ever."""
        async for event in self._client.events:
            data = event.get("data")
            await handle(str(event["event"]), data if isinstance(data, dict) else {})

    async def close(self) -> None:
        """End the connection; one that QEMU has ended already says so here, which is no news."""
        with suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
