"""The registry of VMs with a hypervisor that is a sleeping process: who comes first, and what is told."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import tempfile
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from common import log, paths, shards
from common.config import ClhConfig, QemuConfig
from common.errors import HypervisorError, NotFoundError, UnavailableError, UnsupportedError, UsageError
from common.linux import cgroup, identity, mounts
from common.services.channel import HybridVsock
from common.services.vmm import (
    AddDevice,
    AddedDevice,
    BlockSpec,
    CreateVm,
    DeviceRemoved,
    PresentDevice,
    ShareSpec,
    Vm,
    VmExited,
)
from common.testing.isolation import in_event_loop
from common.workers import Workers
from procs.vmm_manager import record as records
from procs.vmm_manager.drivers import Capabilities, Restoring
from procs.vmm_manager.drivers.spawn import Process
from procs.vmm_manager.registry import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from common.bus.events import Publisher
    from common.processes import ProcessIdentity
    from procs.vmm_manager.record import VmRecord


VMM = ["/bin/sh", "-c", "echo up; exec sleep 1000"]


class FakeDevices:
    """Devices that are there as soon as they are asked for."""

    def __init__(self, on_removed: Callable[[str], None]) -> None:
        self._on_removed = on_removed
        self._added: dict[str, AddedDevice] = {}

    async def find(self, serial: str) -> AddedDevice | None:
        return self._added.get(serial)

    async def add(self, request: AddDevice) -> AddedDevice:
        if not Path(request.spec.source).is_dir():
            raise FileNotFoundError(request.spec.source)
        self._added[request.serial] = AddedDevice(hypervisor_id=f"d{len(self._added) + 1}", guest_path="01/00")
        return self._added[request.serial]

    async def remove(self, hypervisor_id: str) -> None:
        self._on_removed(hypervisor_id)

    async def present(self) -> list[PresentDevice]:
        return []


class FakeMachine:
    """A VM that is a sleeping process."""

    counters: Mapping[str, Mapping[str, int]] = MappingProxyType({"group": MappingProxyType({"seen": 1})})

    def __init__(self, vm: Vm, process: Process, on_removed: Callable[[str], None]) -> None:
        self.vm = vm
        self.process = process
        self.devices = FakeDevices(on_removed)
        self.answers = True

    @property
    def is_running(self) -> bool:
        return self.process.is_running

    async def runstate(self) -> str:
        if not self.answers:
            raise UnavailableError("connection refused")
        return "running"

    async def pause(self) -> None:
        """Be about to end: nobody listens any more, and the process is still there."""
        self.answers = False
        asyncio.get_running_loop().call_later(0.05, os.kill, self.vm.process.pid, signal.SIGKILL)
        raise HypervisorError("it went away before it answered")

    async def resume(self) -> None: ...

    async def console_tail(self) -> str:
        return f"console of {self.vm.process.pid}"

    def log_tail(self) -> str:
        return ""

    async def wait_end(self) -> None:
        await self.process.wait()


class FakeDriver:
    """Starts such VMs, or fails as told.

    Attributes:
        error: what the next start raises after its process is there.
        unreadable: the sandbox whose files another manager cannot open.
        started: records of the VMs that were started.
    """

    name = "qemu"

    def __init__(self, *devices: type) -> None:
        self.capabilities = Capabilities(devices=devices or (ShareSpec,))
        self.error: Exception | None = None
        self.unreadable = ""
        self.started: list[VmRecord] = []
        self._processes: list[Process] = []

    async def prepare(self) -> None: ...

    async def start(
        self, record: VmRecord, _: Workers, on_removed: Callable[[str], None], restoring: Restoring | None = None
    ) -> FakeMachine:
        assert restoring is None
        directory = paths.vm_dir(record.sandbox_id)
        process = Process.start(VMM, cgroup=cgroup.path(record.sandbox_id), directory=directory, log="log", fds=[])
        self._processes.append(process)
        select.select([process.output.fd], [], [])  # it runs, and is in its cgroup
        if self.error is not None:
            raise self.error
        self.started.append(record)
        record.vm = vm_of(record.sandbox_id, process.identity)
        record.save()
        return FakeMachine(record.vm, process, on_removed)

    async def reap(self) -> None:
        """Reap what has ended, as init does for a manager that has ended."""
        for process in self._processes:
            if not process.is_running:
                await process.wait()

    async def adopt(self, record: VmRecord, _: Workers, on_removed: Callable[[str], None]) -> FakeMachine | None:
        if record.vm is None:
            return None
        if record.sandbox_id == self.unreadable:
            raise PermissionError(record.sandbox_id)
        process = Process.find(record.vm.process, directory=paths.vm_dir(record.sandbox_id), log="log")
        return None if process is None else FakeMachine(record.vm, process, on_removed)


def vm_of(sandbox_id: str, process: ProcessIdentity) -> Vm:
    return Vm(
        sandbox_id=sandbox_id,
        hypervisor="qemu",
        version="1",
        accelerator="tcg",
        process=process,
        channel=HybridVsock(socket=""),
        console_log="",
        hotplug_buses=(),
    )


class Told:
    """A publisher that remembers what was published.

    Attributes:
        bodies: of the events, in order.
    """

    def __init__(self) -> None:
        self.bodies: list[object] = []
        self._news = asyncio.Condition()

    async def publish(self, _: object, body: object, *, audience: str) -> None:
        assert audience == shards.FIRST
        async with self._news:
            self.bodies.append(body)
            self._news.notify_all()

    async def wait_for(self, body: object) -> None:
        async with self._news:
            await self._news.wait_for(lambda: body in self.bodies)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A sandbox with a directory; no process of it may be left."""
    directory = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, directory)
    sandbox_id = f"r{uuid.uuid4().hex[:8]}"
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    yield sandbox_id
    left = cgroup.processes(sandbox_id)
    cgroup.kill(sandbox_id)
    shutil.rmtree(directory)
    assert left == []


@asynccontextmanager
async def registering(driver: FakeDriver | None = None) -> AsyncIterator[tuple[Registry, Told]]:
    """A recovered registry; leaving it ends no VM."""
    driver = driver or FakeDriver()
    told: Any = Told()
    publisher: Publisher = told
    async with Workers() as workers:
        registry = Registry(driver, publisher, workers)
        await registry.recover()
        yield registry, told
    await driver.reap()


def wish(sandbox_id: str) -> CreateVm:
    return CreateVm(sandbox_id=sandbox_id, config=QemuConfig())


def share(sandbox_id: str, source: str) -> AddDevice:
    spec = ShareSpec(source=source, tag="t")
    return AddDevice(sandbox_id=sandbox_id, bus="b", slot=0, serial="0" * 20, spec=spec)


@in_event_loop
async def test_a_vm_is_on_record_with_its_request_before_it_runs(sandbox: str) -> None:
    driver = FakeDriver()
    async with registering(driver) as (registry, _):
        with log.bound(request="r1"):
            await registry.create(wish(sandbox))
        assert [record.request_id for record in driver.started] == ["r1"]
        assert list(records.load_all()) == driver.started
        await registry.destroy(sandbox)


@in_event_loop
async def test_a_configuration_of_another_hypervisor_is_refused(sandbox: str) -> None:
    async with registering() as (registry, _):
        with pytest.raises(UsageError, match="this is the manager of qemu, and the configuration is clh's"):
            await registry.create(CreateVm(sandbox_id=sandbox, config=ClhConfig()))
    assert list(records.load_all()) == []


@in_event_loop
async def test_the_vms_of_other_managers_are_left_alone(sandbox: str) -> None:
    Path(paths.vm_dir(sandbox)).mkdir()
    records.VmRecord(sandbox_id=sandbox, config=ClhConfig()).save()
    async with registering() as (registry, told):
        assert registry.vms() == ()
        assert told.bodies == []
    assert Path(paths.vm_dir(sandbox)).is_dir()


@pytest.mark.parametrize("error", [HypervisorError("no"), OSError("no"), RuntimeError("no")])
@in_event_loop
async def test_what_a_failed_start_leaves_is_removed(sandbox: str, error: Exception) -> None:
    driver = FakeDriver()
    driver.error = error
    async with registering(driver) as (registry, _):
        with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else HypervisorError):
            await registry.create(wish(sandbox))
        assert cgroup.processes(sandbox) == []
        assert list(Path(paths.sandbox_dir(sandbox)).iterdir()) == []
        driver.error = None
        assert (await registry.create(wish(sandbox))).sandbox_id == sandbox
        await registry.destroy(sandbox)


@in_event_loop
async def test_a_vm_made_while_its_predecessor_is_buried_is_not_buried_with_it(sandbox: str) -> None:
    async with registering() as (registry, told):
        for _ in range(5):
            first = await registry.create(wish(sandbox))
            machine = registry.machine(sandbox)
            assert isinstance(machine, FakeMachine)
            machine.process.kill()
            await machine.process.wait()
            second = await registry.create(wish(sandbox))
            assert second.process != first.process
            assert registry.vms() == (second,)
            assert cgroup.processes(sandbox) == [second.process.pid]
            assert (await registry.describe(sandbox)).console_tail == f"console of {second.process.pid}"
            await registry.destroy(sandbox)
        assert told.bodies == [VmExited(sandbox_id=sandbox)] * 10, "each end is told once"


@in_event_loop
async def test_last_words_are_known_until_the_sandbox_is_gone(sandbox: str) -> None:
    async with registering() as (registry, told):
        vm = await registry.create(wish(sandbox))
        cgroup.kill(sandbox)
        await told.wait_for(VmExited(sandbox_id=sandbox))
        status = await registry.describe(sandbox)
        assert (status.is_running, status.runstate) == (False, "gone")
        assert status.console_tail == f"console of {vm.process.pid}"
        with pytest.raises(NotFoundError):
            registry.machine(sandbox)
        shutil.rmtree(paths.sandbox_dir(sandbox))
        with pytest.raises(NotFoundError):
            await registry.describe(sandbox)


@in_event_loop
async def test_destroying_twice_or_at_once_or_nothing_is_fine(sandbox: str) -> None:
    async with registering() as (registry, told):
        await registry.destroy(sandbox)
        await registry.create(wish(sandbox))
        await asyncio.gather(*(registry.destroy(sandbox) for _ in range(3)))
        assert told.bodies == [VmExited(sandbox_id=sandbox)]
        with pytest.raises(NotFoundError):
            await registry.describe(sandbox)


@in_event_loop
async def test_what_a_driver_mounted_is_unmounted_and_what_is_behind_it_stays(sandbox: str) -> None:
    async with registering() as (registry, _):
        await registry.create(wish(sandbox))
        source, target = Path(paths.sandbox_dir(sandbox)) / "source", Path(paths.vm_dir(sandbox)) / "jail"
        for directory in (source, target):
            directory.mkdir()
        (source / "kernel").touch()
        mounts.mount(str(source), str(target), flags=mounts.MS_BIND)
        await registry.destroy(sandbox)
        assert mounts.mounted_below(paths.sandbox_dir(sandbox)) == []
        assert not Path(paths.vm_dir(sandbox)).exists()
        assert (source / "kernel").exists()


@in_event_loop
async def test_another_manager_takes_over_what_lives_and_tells_of_the_rest(sandbox: str) -> None:
    dead = f"{sandbox}d"
    Path(paths.sandbox_dir(dead)).mkdir()
    driver = FakeDriver()
    async with registering(driver) as (registry, _):
        vm = await registry.create(wish(sandbox))
        doomed = (await registry.create(wish(dead))).process
    identity.kill(doomed.pid, doomed.start_time)
    async with registering(driver) as (registry, told):
        assert registry.vms() == (vm,)
        assert told.bodies == [VmExited(sandbox_id=dead)]
        assert not Path(cgroup.path(dead)).exists()
        assert await registry.create(wish(sandbox)) == vm, "the same call gives the same answer"
        await registry.destroy(sandbox)


@in_event_loop
async def test_a_vm_that_cannot_be_taken_over_is_ended_and_the_others_go_on(sandbox: str) -> None:
    broken = f"{sandbox}b"
    Path(paths.sandbox_dir(broken)).mkdir()
    driver = FakeDriver()
    async with registering(driver) as (registry, _):
        vm = await registry.create(wish(sandbox))
        await registry.create(wish(broken))
    driver.unreadable = broken
    async with registering(driver) as (registry, told):
        assert registry.vms() == (vm,)
        assert told.bodies == [VmExited(sandbox_id=broken)]
        assert not Path(cgroup.path(broken)).exists()
        await registry.destroy(sandbox)


@in_event_loop
async def test_what_vms_count_is_a_metric_for_each_group(sandbox: str) -> None:
    async with registering() as (registry, _):
        await registry.create(wish(sandbox))
        (family,) = registry.metrics()
        assert (family.name, family.kind) == ("kata_qemu_group", "gauge")
        assert [(item.labels, item.value) for item in family.samples] == [({"sandbox_id": sandbox, "item": "seen"}, 1)]
        await registry.destroy(sandbox)
        assert registry.metrics() == ()


@in_event_loop
async def test_a_removed_device_is_told(sandbox: str) -> None:
    async with registering() as (registry, told):
        await registry.create(wish(sandbox))
        assert (await registry.add_device(share(sandbox, "/"))).hypervisor_id == "d1"
        await registry.machine(sandbox).devices.remove("d1")
        await told.wait_for(DeviceRemoved(sandbox_id=sandbox, hypervisor_id="d1"))
        await registry.destroy(sandbox)


@in_event_loop
async def test_an_attach_that_is_asked_for_again_is_answered(sandbox: str) -> None:
    async with registering() as (registry, _):
        await registry.create(wish(sandbox))
        added = await registry.add_device(share(sandbox, "/"))
        assert await registry.add_device(share(sandbox, "/")) == added
        another = await registry.add_device(msgspec.structs.replace(share(sandbox, "/"), serial="another"))
        assert another.hypervisor_id == "d2"
        await registry.destroy(sandbox)


@in_event_loop
async def test_a_device_that_cannot_be_plugged_is_the_hypervisors_failure(sandbox: str) -> None:
    async with registering() as (registry, _):
        await registry.create(wish(sandbox))
        with pytest.raises(HypervisorError, match="/no/such"):
            await registry.add_device(share(sandbox, "/no/such"))
        await registry.destroy(sandbox)


@in_event_loop
async def test_what_a_hypervisor_cannot_do_is_not_tried(sandbox: str) -> None:
    async with registering(FakeDriver(BlockSpec)) as (registry, _):
        await registry.create(wish(sandbox))
        with pytest.raises(UnsupportedError, match="qemu cannot plug a share device"):
            await registry.add_device(share(sandbox, "/"))
        await registry.destroy(sandbox)


@in_event_loop
async def test_a_vm_that_ends_while_it_is_to_be_paused_has_ended(sandbox: str) -> None:
    async with registering() as (registry, _):
        await registry.create(wish(sandbox))
        with pytest.raises(NotFoundError, match="ended meanwhile"):
            await registry.pause(sandbox)
