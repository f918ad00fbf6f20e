"""The VM manager with real QEMU: what it starts, takes over and cleans up. Most of this needs no booted guest."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
from qemu.qmp import QMPClient

from common import paths, shards
from common.bus.events import Subscriber
from common.errors import HypervisorError, NotFoundError
from common.linux import cgroup
from common.services import vmm
from common.testing.isolation import in_event_loop
from common.testing.stack import GUEST
from common.testing.vmm_stand import SERVICE, booted, config, heard, managing
from common.workers import Workers
from procs.shim import cleanup
from procs.vmm_manager.drivers.qemu.driver import QemuDriver
from procs.vmm_manager.record import DeviceRecord, VmRecord


def left_in(sandbox: str) -> list[str]:
    """Return what is in a sandbox's directory beside the share, which is the shim's, and whether it has a cgroup."""
    names = [name for name in os.listdir(paths.sandbox_dir(sandbox)) if name != "share"]  # noqa: PTH208
    return names + (["cgroup"] if Path(cgroup.path(sandbox)).exists() else [])


@in_event_loop
async def test_a_vm_from_its_making_to_its_end(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        assert psutil.Process(vm.process.pid).name().startswith("qemu-system")
        assert cgroup.processes(sandbox) == [vm.process.pid]
        assert await manager.create(sandbox) == vm, "asking again changes nothing"
        assert (await manager.describe(sandbox)).runstate == "running"
        await manager.destroy(sandbox)
        await manager.destroy(sandbox)
        assert not psutil.pid_exists(vm.process.pid)
        assert left_in(sandbox) == []
        with pytest.raises(NotFoundError):
            await manager.describe(sandbox)


@in_event_loop
async def test_two_who_ask_at_once_get_one_vm(sandbox: str) -> None:
    async with managing() as manager:
        first, second = await asyncio.gather(manager.create(sandbox), manager.create(sandbox))
        assert first == second
        assert cgroup.processes(sandbox) == [first.process.pid]
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_vm_detached_from_the_manager(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        assert os.getsid(vm.process.pid) == vm.process.pid
        manager.process.send_signal(signal.SIGTERM)
        assert manager.process.wait() == 0
        assert psutil.Process(vm.process.pid).status() != psutil.STATUS_ZOMBIE
        inherited = {str(Path(f"/proc/{vm.process.pid}/fd/{fd}").readlink()) for fd in (0, 1, 2)}
        assert inherited == {"/dev/null", f"{paths.vm_dir(sandbox)}/qemu.log"}, "no pipe to the manager"
        await manager.start()
        assert await manager.vms() == (vm,)
        await manager.destroy(sandbox)


@in_event_loop
async def test_the_end_of_a_vm_is_told_and_its_last_words_are_kept(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        await manager.create(sandbox, kernel_params="rdinit=/no/such/init")
        await heard(news, vmm.VM_EXITED.topic)
        status = await manager.describe(sandbox)
        assert not status.is_running
        assert "Kernel panic - not syncing" in status.console_tail
        assert left_in(sandbox) == []
        await manager.destroy(sandbox)
        with pytest.raises(NotFoundError):
            await manager.describe(sandbox)


@in_event_loop
async def test_a_vm_that_ends_while_the_manager_is_away_is_told_on_return(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        manager.kill()
        qemu = psutil.Process(vm.process.pid)
        qemu.kill()
        qemu.wait()
        await manager.start()
        assert await manager.vms() == ()
        assert left_in(sandbox) == []


async def paused(vm: vmm.Vm, sandbox: str) -> None:
    """Wait until QEMU has stopped its guest, asking QEMU itself."""
    qmp = QMPClient()
    await qmp.connect(f"{paths.vm_dir(sandbox)}/qmp")
    while (await qmp.execute("query-status"))["status"] == "running":  # type: ignore[index]  # a JSON object
        await qmp.events.get()
    await qmp.disconnect()
    assert psutil.Process(vm.process.pid).is_running()


@in_event_loop
async def test_a_guest_that_ends_while_the_manager_is_away_is_ended_on_return(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox, kernel_params="rdinit=/no/such/init")
        manager.kill()
        await paused(vm, sandbox)
        await manager.start()
        await manager.logs("VM ended")
        status = await manager.describe(sandbox)
        assert not status.is_running
        assert "Kernel panic - not syncing" in status.console_tail
        await manager.destroy(sandbox)


@in_event_loop
async def test_the_next_vm_of_a_sandbox_never_meets_the_last(sandbox: str) -> None:
    async with managing() as manager:
        first = await manager.create(sandbox)
        os.kill(first.process.pid, signal.SIGKILL)
        second = await manager.create(sandbox)
        while second.process == first.process:
            second = await manager.create(sandbox)  # the kernel had not yet ended it
        assert cgroup.processes(sandbox) == [second.process.pid]
        assert (await manager.describe(sandbox)).is_running
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_sandbox_that_was_cleaned_up_behind_its_back(sandbox: str) -> None:
    """By the shim's `delete`, which asks nobody, while the manager cleans up as well."""
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        await manager.create(sandbox)
        await asyncio.to_thread(cleanup.clean, sandbox, "/no/bundle", "/no/socket")
        assert not Path(paths.sandbox_dir(sandbox)).exists()
        await heard(news, vmm.VM_EXITED.topic)
        assert await manager.vms() == ()
        with pytest.raises(NotFoundError):
            await manager.describe(sandbox)


@in_event_loop
async def test_a_half_made_vm_is_made_again(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        manager.kill()
        record = Path(paths.vm_dir(sandbox)) / "vm.json"
        record.write_text(f'{{"sandbox_id": "{sandbox}"}}')  # as it is before QEMU's monitor has answered
        await manager.start()
        assert cgroup.processes(sandbox) == []
        again = await manager.create(sandbox)
        assert again.process != vm.process
        await manager.destroy(sandbox)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernel": "/no/such/kernel"}, "QEMU ended before it ran: .*could not open kernel file '/no/such/kernel'"),
        ({"default_memory": 1 << 40}, "QEMU ended before it ran: .*guest RAM"),
        ({"default_vcpus": 1000}, "QEMU ended before it ran: .*CPUs"),
        ({"path": "/no/such/qemu"}, "QEMU ended before it ran: .*/no/such/qemu"),
        ({"path": "/bin/true"}, "QEMU ended before it ran: it said nothing"),
    ],
)
@in_event_loop
async def test_qemus_own_words_are_in_the_error_and_nothing_is_left(
    sandbox: str, changes: dict[str, object], said: str
) -> None:
    async with managing() as manager:
        with pytest.raises(HypervisorError, match=f"(?s){said}"):
            await manager.create(sandbox, **changes)
        assert left_in(sandbox) == []
        assert await manager.vms() == ()


@in_event_loop
async def test_paths_may_have_commas(sandbox: str) -> None:
    links = {"kernel": GUEST / "vmlinux", "initrd": GUEST / "initrd.img"}
    for name, target in links.items():
        (Path(paths.run_dir()) / f"{name},x=y").symlink_to(target)
    async with managing() as manager:
        vm = await manager.create(sandbox, **{name: f"{paths.run_dir()}/{name},x=y" for name in links})
        await booted(vm)
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_sandbox_without_a_directory_gets_no_vm(sandbox: str) -> None:
    async with managing() as manager:
        with pytest.raises(NotFoundError, match="has no directory"):
            await manager.create(f"{sandbox}x")
        assert not Path(cgroup.path(f"{sandbox}x")).exists()


@in_event_loop
async def test_a_lost_monitor_is_found_again(sandbox: str) -> None:
    Path(paths.vm_dir(sandbox)).mkdir()
    cgroup.create(sandbox)
    record = VmRecord(sandbox_id=sandbox, config=config())
    removed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with Workers() as workers:
        machine = await QemuDriver().start(record, workers, removed.set_result)
        record.devices["share-1"] = DeviceRecord(
            bus="port0", slot=0, serial="s", spec=vmm.ShareSpec(source="/", tag="t")
        )
        connection = machine._qmp._client._writer
        assert connection is not None
        connection.transport.abort()
        assert await removed == "share-1", "QEMU was asked what had happened meanwhile"
        assert await machine.runstate() == "running"
        await asyncio.to_thread(cgroup.kill, sandbox)
        await machine.wait_end()
