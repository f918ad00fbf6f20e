"""Speaking QMP to one QEMU: bounded commands, our errors, every event to one handler.

Commands are matched to replies by id, so one that we stop waiting for does not shift the others. A command whose
deadline passed may still take effect: the caller asks QEMU what is true. When the connection ends, the client's event
queue falls silent and says nothing; :meth:`Qmp.wait_lost` does.

Source: QEMU's docs/interop/qmp-spec.rst; the client is the qemu.qmp package.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate, StateError

from common.errors import DeadlineError, HypervisorError, KataError, NotFoundError, UnsupportedError
from procs.vmm_manager.drivers.qemu.cmdline import QMP_SOCKET
from procs.vmm_manager.drivers.spawn import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

COMMAND_TIMEOUT_S = 10.0
"""How long a running QEMU may take to answer."""

_KINDS: dict[str, type[KataError]] = {"DeviceNotFound": NotFoundError, "CommandNotFound": UnsupportedError}
"""What the classes of QEMU's errors mean, those that have not become ``GenericError`` (qapi/error.json)."""


class Qmp:
    """The connection to the monitor of one QEMU; it may be made again after it was lost."""

    def __init__(self, name: str, directory: str) -> None:
        self._client = QMPClient(name)
        self._directory = directory
        self._sending = asyncio.Lock()

    async def connect(self, *, timeout_s: float) -> str:
        """Connect to the socket in the VM's directory and negotiate; return QEMU's version.

        Raises:
            HypervisorError: nobody answers there, or no QEMU.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(connect(self._directory, QMP_SOCKET))
        except TimeoutError as err:
            raise HypervisorError(f"QEMU's monitor does not answer within {timeout_s:g} s") from err
        except (QMPError, OSError) as err:
            raise HypervisorError(f"QEMU's monitor does not answer: {err}") from err
        version: Any = self._client.greeting.QMP.version.get("qemu") if self._client.greeting else None
        if not isinstance(version, dict):
            raise HypervisorError(f"QEMU's monitor names no version: {version!r}")
        return ".".join(str(version.get(part)) for part in ("major", "minor", "micro"))

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON of QEMU's choosing
        """Run a command and return its result.

        Raises:
            NotFoundError: QEMU knows no such device.
            UnsupportedError: it knows no such command.
            HypervisorError: QEMU refused, with its own words, or went away.
            DeadlineError: no answer; whether it took effect must be asked.
        """
        return await self.execute_within(COMMAND_TIMEOUT_S, command, **arguments)

    async def execute_within(self, timeout_s: float, command: str, **arguments: object) -> Any:  # noqa: ANN401 - likewise
        """Do the same with more patience or less, in seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except TimeoutError as err:
            raise DeadlineError(f"QEMU did not answer {command} within {timeout_s:g} s") from err
        except ExecuteError as err:
            kind = _KINDS.get(err.error_class, HypervisorError)
            raise kind(f"QEMU refused {command}: {err}") from err
        except (ExecInterruptedError, StateError) as err:
            raise HypervisorError(f"QEMU went away before it answered {command}") from err

    async def send(self, fd: int, name: str) -> None:
        """Hand a descriptor to QEMU, which knows it by name until something takes it.

        Raises:
            HypervisorError: QEMU refused, or went away.
        """
        # The two are not to be parted by another command: QEMU gives the last descriptor that came to `getfd`.
        async with self._sending:
            if self._client.runstate != Runstate.RUNNING:
                raise HypervisorError("QEMU went away before it took a descriptor")
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as err:
                raise HypervisorError(f"QEMU takes no descriptor: {err}") from err
            await self.execute("getfd", fdname=name)

    async def follow(self, handle: Callable[[str, dict[str, Any]], Awaitable[None]]) -> None:
        """Hand each event's name and data to a handler, for ever, over all connections."""
        async for event in self._client.events:
            data = event.get("data")
            await handle(str(event["event"]), data if isinstance(data, dict) else {})

    async def wait_lost(self) -> None:
        """Wait until there is no connection."""
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        await self.close()

    async def close(self) -> None:
        """End the connection; one that QEMU has ended already says so here, which is no news."""
        with suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
