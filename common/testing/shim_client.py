"""What drives a shim under test: the Task API as containerd calls it, and FIFOs as its clients use them."""

from __future__ import annotations

import asyncio
import json
import os
from signal import SIGKILL
from typing import TYPE_CHECKING

import pytest

from common.errors import KataError
from common.protocols import task

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from common.testing.shim_stand import ShimStand
    from common.ttrpc.client import TtrpcClient

KILLED = 128 + SIGKILL


class Shim:
    """The Task API of a stand's shim. Each method is the verb of its name and raises what the shim answers."""

    def __init__(self, stand: ShimStand, client: TtrpcClient) -> None:
        self.stand = stand
        self.client = client

    async def create(self, *args: str, stdin: str = "", stdout: str = "", stderr: str = "") -> int:
        """Create the container; return the pid that it is known by."""
        request = self.stand.create_request(*args, stdin=stdin, stdout=stdout, stderr=stderr)
        return (await self.stand.call(self.client, "Create", request, task.PidResponse)).pid

    async def start(self, exec_id: str = "") -> int:
        """Start the container or an exec; return the pid that it is known by."""
        return (await self.stand.call(self.client, "Start", self.name(exec_id), task.PidResponse)).pid

    async def state(self, exec_id: str = "") -> task.StateResponse:
        """Ask for the state."""
        return await self.stand.call(self.client, "State", self.name(exec_id), task.StateResponse)

    async def wait(self, exec_id: str = "") -> int:
        """Wait for the end; return the exit status."""
        return (await self.stand.call(self.client, "Wait", self.name(exec_id), task.WaitResponse)).exit_status

    async def exec(self, exec_id: str, *args: str, stdin: str = "", stdout: str = "", stderr: str = "") -> None:
        """Register an exec."""
        spec = json.dumps({"args": list(args), "cwd": "/"}).encode()
        request = task.ExecProcessRequest(
            id=self.stand.id,
            exec_id=exec_id,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            spec=task.Any(type_url="types.containerd.io/opencontainers/runtime-spec/1/Process", value=spec),
        )
        await self.stand.call(self.client, "Exec", request, task.Empty)

    async def kill(self, signal: int, exec_id: str = "", *, is_all: bool = False) -> None:
        """Send a signal."""
        request = task.KillRequest(id=self.stand.id, exec_id=exec_id, signal=signal, all=is_all)
        await self.stand.call(self.client, "Kill", request, task.Empty)

    async def ask(self, verb: str) -> None:
        """Call a verb that is only told which container and answers nothing: Pause, Resume."""
        await self.stand.call(self.client, verb, task.IdRequest(id=self.stand.id), task.Empty)

    async def close_io(self, exec_id: str = "") -> None:
        """Let standard input end."""
        request = task.CloseIORequest(id=self.stand.id, exec_id=exec_id, stdin=True)
        await self.stand.call(self.client, "CloseIO", request, task.Empty)

    async def delete(self, exec_id: str = "") -> task.DeleteResponse:
        """Delete the container or an exec."""
        return await self.stand.call(self.client, "Delete", self.name(exec_id), task.DeleteResponse)

    async def shutdown(self) -> None:
        """Ask the shim to end."""
        await self.stand.call(self.client, "Shutdown", task.ShutdownRequest(id=self.stand.id), task.Empty)

    async def reached(self) -> None:
        """Return when the shim has taken all that was asked before: it refuses at once what it does not know."""
        await asyncio.sleep(0)  # what was spawned before writes its request now
        await refusal(self.stand.call(self.client, "Frobnicate", task.IdRequest(id=self.stand.id), task.Empty))

    def name(self, exec_id: str) -> task.StateRequest:
        """Return the request that names a process."""
        return task.StateRequest(id=self.stand.id, exec_id=exec_id)


async def started(stand: ShimStand) -> Shim:
    """Start the stand's shim."""
    return Shim(stand, await stand.start())


async def carry_streams(shim: Shim, *, status: int) -> None:
    """Run a process that ends with a status; what it reads and writes has to pass unchanged, to its end."""
    stand = shim.stand
    out, err, stdin = Reader(stand, "out"), Reader(stand, "err"), stand.fifo("in")
    sink = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
    await shim.create("sh", "-c", f"cat; echo wrong >&2; exit {status}", stdin=stdin, stdout=out.path, stderr=err.path)
    await shim.start()
    os.write(sink, b"right\n")
    await out.until(b"right\n")
    os.close(sink)
    await shim.close_io()
    assert (await out.all(), await err.all()) == (b"right\n", b"wrong\n")
    assert await shim.wait() == status


async def refusal(work: Awaitable[object]) -> KataError:
    """Await something that fails; return its error."""
    with pytest.raises(KataError) as caught:
        await work
    return caught.value


class Reader:
    """Reads a FIFO as containerd's client does: it has it open before the process exists."""

    def __init__(self, stand: ShimStand, name: str) -> None:
        self.path = stand.fifo(name)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._data = bytearray()
        self._has_ended = asyncio.Event()
        self._has_news = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._take)

    async def all(self) -> bytes:
        """Return everything, once it has ended."""
        await self._has_ended.wait()
        return bytes(self._data)

    async def until(self, wanted: bytes) -> None:
        """Wait until ``wanted`` has been read."""
        while wanted not in self._data:
            self._has_news.clear()
            await self._has_news.wait()

    def _take(self) -> None:
        data = os.read(self._fd, 65536)
        self._data += data
        self._has_news.set()
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._has_ended.set()
