"""VMMs whose end takes longer than that of their daemons: to give gigabytes back does, and more so on a busy host.

The VMM is the first process of a PID namespace: killed, it ends when all others there are gone for whoever is their
parent (pid_namespaces(7)), and the parent of one of them stands still until it is told.
"""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psutil

from common.linux import cgroup
from common.processes import ProcessIdentity
from common.testing.isolation import in_event_loop
from procs.vmm_manager.drivers.daemons import ends_before
from procs.vmm_manager.drivers.spawn import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SLEEP = ("sleep", "1000")


class Slow:
    """A VMM and its daemon in a cgroup; the VMM ends when it is killed and told."""

    def __init__(self, directory: Path) -> None:
        self.sandbox_id = f"e{uuid.uuid4().hex[:8]}"
        self._directory = str(directory)
        self._cgroup = cgroup.create(self.sandbox_id)
        self.daemon = self._start("daemon", *SLEEP)
        self._outer = self._start("outer", "unshare", "--pid", "--fork", *SLEEP)
        self.vmm = self._find(self._outer)
        inside = f"--pid=/proc/{self.vmm.identity.pid}/ns/pid"
        self._holder = psutil.Popen(["nsenter", inside, *SLEEP], stdin=subprocess.DEVNULL)
        only_child(self._holder.pid)
        self._holder.suspend()
        while self._holder.status() != psutil.STATUS_STOPPED:
            pass  # until then it would still note that its child is gone

    async def kill_all(self) -> None:
        """Kill all at once and wait for their ends, as who destroys a sandbox does."""
        await asyncio.to_thread(cgroup.kill, self.sandbox_id)

    def let_end(self) -> None:
        """Let the VMM, which has been killed, end."""
        self._holder.resume()

    def _start(self, name: str, *argv: str) -> Process:
        return Process.start(argv, cgroup=self._cgroup, directory=self._directory, log=name, fds=[])

    def _find(self, outer: Process) -> Process:
        identity = ProcessIdentity.of(only_child(outer.identity.pid))
        found = Process.find(identity, directory=self._directory, log="vmm")
        assert found is not None
        return found

    async def close(self) -> None:
        self.let_end()
        await self.kill_all()
        self._holder.wait()
        for process in (self.daemon, self.vmm, self._outer):
            await process.wait()


def only_child(pid: int) -> int:
    """Wait for the child of a process that starts one, and for that to run what it is to."""
    while not [child for child in psutil.Process(pid).children() if child.name() == SLEEP[0]]:
        pass
    (child,) = psutil.Process(pid).children()
    return child.pid


@asynccontextmanager
async def slow(directory: Path) -> AsyncIterator[Slow]:
    """A VMM that is slow to end."""
    stand = Slow(directory)
    try:
        yield stand
    finally:
        await stand.close()


@in_event_loop
async def test_a_daemon_that_is_killed_with_its_vmm_did_not_end_before_it(tmp_path: Path) -> None:
    async with slow(tmp_path) as stand, asyncio.TaskGroup() as tasks:
        tasks.create_task(stand.kill_all())
        assert not await ends_before(stand.daemon, stand.vmm)
        assert stand.vmm.is_running, "its end is still to come"
        stand.let_end()


@in_event_loop
async def test_nor_did_one_that_ends_because_we_kill_its_vmm(tmp_path: Path) -> None:
    async with slow(tmp_path) as stand:
        stand.vmm.kill()
        stand.daemon.kill()
        assert not await ends_before(stand.daemon, stand.vmm)
        assert stand.vmm.is_running


@in_event_loop
async def test_a_vmm_that_nobody_has_killed_lives_on(tmp_path: Path) -> None:
    async with slow(tmp_path) as stand:
        stand.daemon.kill()
        assert not stand.vmm.is_ending
        assert await ends_before(stand.daemon, stand.vmm)


@in_event_loop
async def test_a_vmm_that_is_killed_while_it_stands_still_is_ending(tmp_path: Path) -> None:
    async with slow(tmp_path) as stand:
        psutil.Process(stand.vmm.identity.pid).suspend()
        psutil.Process(stand.vmm.identity.pid).kill()
        while not stand.vmm.is_ending:  # noqa: ASYNC110 - the kernel's own pace
            await asyncio.sleep(0)
        assert stand.vmm.is_running
        stand.let_end()
        await stand.vmm.wait()
        assert stand.vmm.is_ending
