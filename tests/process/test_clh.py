"""A VM of Cloud Hypervisor from its start to its end, on the fake."""

from __future__ import annotations

import shutil
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from common import paths, shards
from common.bus.events import Subscriber
from common.errors import HypervisorError, KataError, NotFoundError, UnavailableError, UnsupportedError
from common.linux import cgroup, identity
from common.services import vmm
from common.services.channel import HybridVsock
from common.testing.demands import How
from common.testing.fake_vmms import CloudHypervisor, trust_kvm
from common.testing.hotplug_stand import a_vm
from common.testing.isolation import in_event_loop
from common.testing.vmm_stand import heard, managing, removed
from procs.vmm_manager.drivers.cloud_hypervisor.api import Api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.testing.vmm_stand import Manager

pytestmark = pytest.mark.usefixtures("run_dir")


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Manager, vmm.Vm, CloudHypervisor]]:
    """A VM manager, its VM and the fake behind it."""
    sandbox_id = f"c{uuid.uuid4().hex[:8]}"
    async with managing("clh") as manager, a_vm(manager, sandbox_id, CloudHypervisor) as (vm, fake):
        yield manager, vm, fake


async def refusal(program: str) -> KataError:
    """Return why a VM of a program is not started, and assert that nothing is left of it."""
    sandbox_id = f"c{uuid.uuid4().hex[:8]}"
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    async with managing("clh") as manager:
        with pytest.raises(KataError) as refused:
            await manager.create(sandbox_id, path=program, **CloudHypervisor.config)
        assert await manager.vms() == ()
    assert cgroup.processes(sandbox_id) == []
    assert not Path(paths.vm_dir(sandbox_id)).exists()
    shutil.rmtree(paths.sandbox_dir(sandbox_id))
    return refused.value


@in_event_loop
async def test_what_callers_are_told_of_it() -> None:
    async with running() as (manager, vm, _):
        assert (vm.hypervisor, vm.version, vm.accelerator) == ("clh", "53.0.0", "kvm")
        assert vm.channel == HybridVsock(socket=f"{paths.vm_dir(vm.sandbox_id)}/vsock")
        assert vm.hotplug_buses == (vmm.HotplugBus(name="segment0", kind=vmm.BusKind.PCI, slots=29),)
        assert (await manager.describe(vm.sandbox_id)).runstate == "running"


@in_event_loop
async def test_a_share_is_served_until_the_guest_lets_it_go() -> None:
    async with running() as (manager, vm, fake), Subscriber({manager.service: shards.FIRST}) as news:
        Path(paths.share_dir(vm.sandbox_id)).mkdir()
        added = await manager.add(vm.sandbox_id)
        assert added == vmm.AddedDevice(hypervisor_id="_fs1", guest_path="03")
        assert len(cgroup.processes(vm.sandbox_id)) > 1, "virtiofsd is the sandbox's"
        await fake.guest_lets_go(does=False)
        await manager.remove(vm.sandbox_id, "_fs1")
        await manager.remove(vm.sandbox_id, "_fs1")  # version 53 does not know it any more, but the guest has it
        assert await manager.present(vm.sandbox_id) == ["_fs1"]
        await fake.guest_lets_go(does=True)
        assert await removed(news) == "_fs1"
        assert await manager.present(vm.sandbox_id) == []
        with pytest.raises(NotFoundError, match="_fs1"):
            await manager.remove(vm.sandbox_id, "_fs1")


@in_event_loop
async def test_a_share_that_cannot_be_is_undone() -> None:
    async with running() as (manager, vm, _):
        with pytest.raises(HypervisorError, match=r"virtiofsd said: .*no/such"):
            await manager.add(vm.sandbox_id, source="/no/such/directory")
        assert await manager.present(vm.sandbox_id) == []
        assert not Path(paths.vm_dir(vm.sandbox_id), "share-1").exists()


@pytest.mark.parametrize("name", ["rebooting", "shutdown"])
@in_event_loop
async def test_a_guest_that_is_not_the_one_that_was_started_ends_its_vm(name: str) -> None:
    async with running() as (manager, vm, fake), Subscriber({manager.service: shards.FIRST}) as news:
        await fake.print("Kernel panic - not syncing\n")
        await fake.tell("vm", name)
        await heard(news, vmm.VM_EXITED.topic)
        status = await manager.describe(vm.sandbox_id)
        assert not status.is_running
        assert "Kernel panic" in status.console_tail


@in_event_loop
async def test_of_a_guest_that_prints_for_ever_the_last_words_are_kept() -> None:
    async with running() as (manager, vm, fake):
        for _ in range(20):
            await fake.print("x" * 30000 + "\n")
        await manager.describe(vm.sandbox_id)  # a manager that is busy may have let the FIFO run full
        await fake.print("the last words\n")
        assert (await manager.describe(vm.sandbox_id)).console_tail.endswith("the last words\n")


@in_event_loop
async def test_a_manager_that_starts_again_takes_it_over() -> None:
    async with running() as (manager, vm, fake):
        device = await manager.plug(vm.sandbox_id, disk())
        manager.kill()
        await fake.let_go(device.hypervisor_id)
        await fake.print("printed meanwhile\n")
        await manager.start()
        assert await manager.vms() == (vm,)
        assert await manager.present(vm.sandbox_id) == []
        assert "printed meanwhile" in (await manager.describe(vm.sandbox_id)).console_tail
        assert (await manager.plug(vm.sandbox_id, disk())).hypervisor_id != device.hypervisor_id


def disk() -> vmm.BlockSpec:
    file = Path(paths.run_dir()) / "disk"
    file.write_bytes(bytes(1 << 20))
    return vmm.BlockSpec(source=str(file))


@in_event_loop
async def test_a_program_that_is_no_cloud_hypervisor_is_quoted(run_dir: Path) -> None:
    trust_kvm(run_dir)
    program = run_dir / "program"
    program.write_text("#!/bin/sh\necho I am another >&2\nexit 1\n")
    program.chmod(0o700)
    error = await refusal(str(program))
    assert type(error) is HypervisorError
    assert "Cloud Hypervisor ended before it ran: I am another" in error.message
    assert str(program) in str(error.hint)


@in_event_loop
async def test_without_kvm_it_says_what_runs_without(run_dir: Path) -> None:
    verdict = {"boot_id": identity.boot_id(), "accelerator": "tcg", "reason": "there is no /dev/kvm"}
    (run_dir / "probe.json").write_bytes(msgspec.json.encode(verdict))
    error = await refusal(CloudHypervisor.install(run_dir))
    assert type(error) is UnsupportedError
    assert error.message == "Cloud Hypervisor needs KVM, which does not work here: there is no /dev/kvm"
    assert "[hypervisor.qemu]" in str(error.hint)


@in_event_loop
async def test_a_cloud_hypervisor_that_is_busy_is_asked_again() -> None:
    async with running() as (manager, vm, fake):
        await fake.misbehave("vm.add-disk", How.BUSY, times=3)
        added = await manager.plug(vm.sandbox_id, disk())
        assert await manager.present(vm.sandbox_id) == [added.hypervisor_id]
        assert [line for line in await fake.transcript() if line.startswith("<-")][-4:-1] == [
            "<- Too Many Requests"
        ] * 3


@in_event_loop
async def test_one_that_stays_busy_is_asked_until_the_time_is_over_and_has_done_nothing() -> None:
    async with running() as (_, vm, fake):
        await fake.misbehave("vm.pause", How.BUSY, times=1000)
        with pytest.raises(UnavailableError, match=r"refused vm\.pause: Too Many Requests"):
            await Api(paths.vm_dir(vm.sandbox_id)).put("vm.pause", timeout_s=2.0)
        assert len([line for line in await fake.transcript() if line == "-> vm.pause"]) > 1
        assert (await Api(paths.vm_dir(vm.sandbox_id)).get("vm.info"))["state"] == "Running"
