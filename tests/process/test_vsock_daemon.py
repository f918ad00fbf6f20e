"""QEMU's vsock daemon and the VM manager: it lives as long as its VM, whoever dies first. QEMU is the fake."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from common import paths
from common.errors import HypervisorError
from common.linux import cgroup, inotify
from common.services.channel import HybridVsock
from common.testing import vsock_daemon as daemons
from common.testing.fake_qemu.__main__ import UNDRIVEN
from common.testing.fake_vmms import Qemu, trust_kvm
from common.testing.isolation import in_event_loop
from common.testing.vmm_stand import Manager, managing
from procs.vmm_manager.drivers.qemu import vsock_daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.vmm import Vm

DIED = "vsock daemon died, ending its VM"


class Stand:
    """A manager, and what its VMs run on."""

    def __init__(self, manager: Manager, directory: Path) -> None:
        self.manager = manager
        self.sandbox_id = f"d{uuid.uuid4().hex[:8]}"
        self._directory = directory

    async def create(self, daemon: str = "", *arguments: str) -> Vm:
        changes = {**Qemu.config, "path": Qemu.install(self._directory, *arguments)}
        path = daemon or daemons.install(self._directory)
        return await self.manager.create(self.sandbox_id, **changes, vhost_user_vsock_daemon=path)

    def daemon(self, vm: Vm) -> psutil.Process:
        """Return the one process of the sandbox that is not the VMM."""
        (pid,) = set(cgroup.processes(self.sandbox_id)) - {vm.process.pid}
        return psutil.Process(pid)

    def left(self) -> tuple[list[int], list[str]]:
        """Return what processes and files there are of the VM."""
        files = [file.name for file in Path(paths.sandbox_dir(self.sandbox_id)).iterdir()]
        return cgroup.processes(self.sandbox_id), files


@asynccontextmanager
async def standing(run_dir: Path) -> AsyncIterator[Stand]:
    trust_kvm(run_dir)
    async with managing() as manager:
        stand = Stand(manager, run_dir)
        Path(paths.sandbox_dir(stand.sandbox_id)).mkdir(parents=True)
        try:
            yield stand
        finally:
            await asyncio.to_thread(cgroup.kill, stand.sandbox_id)


@in_event_loop
async def test_a_guest_is_reached_by_the_daemons_socket_and_both_end_together(run_dir: Path) -> None:
    async with standing(run_dir) as stand:
        vm = await stand.create()
        assert vm.channel == HybridVsock(socket=f"{paths.vm_dir(stand.sandbox_id)}/vsock", is_late=True)
        daemon = stand.daemon(vm)
        assert os.getsid(daemon.pid) == daemon.pid
        inherited = " ".join(psutil.Process(vm.process.pid).cmdline())
        assert "vhost-user-vsock-pci,id=vsock,bus=pcie.0,addr=0x3,chardev=vsock" in inherited
        assert await stand.create() == vm, "asking again changes nothing"
        await stand.manager.destroy(stand.sandbox_id)
        assert stand.left() == ([], [])
        assert not daemon.is_running()
        assert DIED not in {record["event"] for record in stand.manager.logged()}


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same manager", "next manager"])
@in_event_loop
async def test_nobody_can_connect_before_the_guest_has_its_driver(run_dir: Path, *, is_restarted: bool) -> None:
    async with standing(run_dir) as stand:
        vm = await stand.create("", UNDRIVEN)
        qemu = Qemu()
        await qemu.connect(vm)
        assert isinstance(vm.channel, HybridVsock)
        path = Path(vm.channel.socket)
        while await qemu.looks() < 3:  # noqa: ASYNC110 - the manager's own pace
            await asyncio.sleep(0.02)
        assert not path.exists()
        if is_restarted:
            stand.manager.kill()
            await stand.manager.start()
        with inotify.watching(path.parent) as directory:
            await qemu.drive()
            await directory.wait_for(path.name)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        await qemu.close()


@pytest.mark.parametrize("is_away", [False, True], ids=["manager is there", "manager is away"])
@in_event_loop
async def test_the_death_of_a_daemon_is_told_and_ends_its_vm(run_dir: Path, *, is_away: bool) -> None:
    async with standing(run_dir) as stand:
        vm = await stand.create()
        stand.manager.kill()
        if not is_away:
            await stand.manager.start()  # it watches also what it did not start
        daemon = stand.daemon(vm)
        daemon.kill()
        daemon.wait()
        if is_away:
            assert psutil.pid_exists(vm.process.pid)
            await stand.manager.start()
        record = await stand.manager.logs(DIED)
        assert (record["level"], record["sandbox"]) == ("error", stand.sandbox_id)
        await stand.manager.logs("VM ended")
        assert stand.left() == ([], [])
        assert not (await stand.manager.describe(stand.sandbox_id)).is_running


@in_event_loop
async def test_a_vm_that_ends_takes_its_daemon_along(run_dir: Path) -> None:
    async with standing(run_dir) as stand:
        vm = await stand.create()
        daemon = stand.daemon(vm)
        psutil.Process(vm.process.pid).kill()
        await stand.manager.logs("VM ended")
        assert stand.left() == ([], [])
        assert not daemon.is_running()
        assert DIED not in {record["event"] for record in stand.manager.logged()}


@in_event_loop
async def test_a_vm_that_ends_while_the_manager_is_away_leaves_no_daemon(run_dir: Path) -> None:
    async with standing(run_dir) as stand:
        vm = await stand.create()
        stand.daemon(vm)
        stand.manager.kill()
        psutil.Process(vm.process.pid).kill()
        await stand.manager.start()
        assert stand.left() == ([], [])


@in_event_loop
async def test_a_daemon_that_does_not_start_says_why_and_nothing_is_left(run_dir: Path) -> None:
    program = run_dir / "broken"
    program.write_text("#!/bin/sh\necho 'no vsock today' >&2; exit 3\n")
    program.chmod(0o700)
    async with standing(run_dir) as stand:
        with pytest.raises(HypervisorError, match=r"broken ended before it listened: no vsock today"):
            await stand.create(str(program))
        assert stand.left() == ([], [])


@in_event_loop
async def test_a_daemon_that_never_listens_is_ended(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_daemon, "_START_TIMEOUT_S", 0.2)
    program = run_dir / "silent"
    program.write_text("#!/bin/sh\necho 'in a moment'; exec sleep 1000\n")
    program.chmod(0o700)
    name = f"d{uuid.uuid4().hex[:8]}"
    group = cgroup.create(name)
    try:
        with pytest.raises(HypervisorError, match=r"silent does not listen after 0.2 s: in a moment"):
            await vsock_daemon.start(str(program), directory=str(run_dir), cgroup=group)
        assert cgroup.processes(name) == []
    finally:
        await asyncio.to_thread(cgroup.kill, name)
