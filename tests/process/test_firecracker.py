"""Firecracker's driver, with a fake Firecracker and its jailer: from the first argument to nothing that is left."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import stat
import sys
import uuid
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from structlog.testing import capture_logs

from common import paths
from common.bus.client import BusClient
from common.bus.wire import Empty
from common.config import BlockDriver, FirecrackerConfig
from common.errors import AlreadyExistsError, HypervisorError, NotFoundError, UnsupportedError, UsageError
from common.linux import cgroup, identity, mounts
from common.services.channel import HybridVsock
from common.services.health import HEALTH
from common.services.vmm import AddDevice, BlockSpec, MemoryMode
from common.testing.fake_firecracker.server import CONTROL_SOCKET
from common.testing.hotplug_stand import plugging
from common.testing.isolation import in_event_loop
from common.workers import Workers
from procs.vmm_manager.drivers import Restoring
from procs.vmm_manager.drivers.firecracker.driver import FirecrackerDriver
from procs.vmm_manager.record import VmRecord
from procs.vmm_manager.snapshots import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from procs.vmm_manager.drivers.firecracker.machine import FirecrackerMachine

MIB = 1 << 20


@dataclass
class Stand:
    """A machine, its record, what was told of it, and how to demand things of the fake."""

    driver: FirecrackerDriver
    record: VmRecord
    machine: FirecrackerMachine
    workers: Workers
    removed: list[str]

    @property
    def root(self) -> Path:
        (root,) = Path(paths.vm_dir(self.record.sandbox_id)).glob("jail/*/*/root")
        return root

    async def ask(self, order: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        reader, writer = await asyncio.open_unix_connection(str(self.root / CONTROL_SOCKET))
        with closing(writer):
            writer.write(json.dumps({"demand": order, **arguments}).encode() + b"\n")
            return json.loads(await reader.readline())

    async def said(self) -> list[str]:
        """Return what was said, without questions."""
        said: list[str] = await self.ask("transcript")
        questions = {number for number, line in enumerate(said) if line.startswith("-> GET")}
        return [line for number, line in enumerate(said) if not {number, number - 1} & questions]

    def request(self, source: Path, slot: int = 0, *, bus: str = "", is_read_only: bool = False) -> AddDevice:
        assert self.record.config is not None
        spec = BlockSpec(source=str(source), is_read_only=is_read_only, driver=self.record.config.block_device_driver)
        kinds = {own.kind: own.name for own in self.machine.vm.hotplug_buses}
        return AddDevice(
            sandbox_id=self.record.sandbox_id,
            spec=spec,
            bus=bus or kinds[spec.bus_kind],
            slot=slot,
            serial=secrets.token_hex(10),
        )

    async def adopt(self) -> None:
        """Have another manager take the VM over."""
        found = await self.driver.adopt(self.record, self.workers, self.removed.append)
        assert found is not None
        self.machine = found


def installed(directory: Path, version: str) -> dict[str, Any]:
    """Write programs that can be started as Firecracker and its jailer, and what they boot."""
    commands = {
        "firecracker": f"common.testing.fake_firecracker --as-version {version}",
        "jailer": "common.testing.fake_firecracker.jailer",
    }
    for name, command in commands.items():
        (directory / name).write_text(f'#!/bin/sh\nexec {sys.executable} -P -m {command} "$@"\n')
        (directory / name).chmod(0o755)
    (directory / "kernel").write_bytes(b"\x7fELF")
    (directory / "initrd").write_bytes(b"0")
    verdict = {"boot_id": identity.boot_id(), "accelerator": "kvm", "reason": "a fake needs none"}
    (directory / "probe.json").write_bytes(msgspec.json.encode(verdict))
    return {
        "path": str(directory / "firecracker"),
        "jailer_path": str(directory / "jailer"),
        "kernel": str(directory / "kernel"),
        "initrd": str(directory / "initrd"),
    }


@asynccontextmanager
async def starting(
    run_dir: Path,
    version: str = "1.16.1",
    restoring: Restoring | None = None,
    **changes: Any,  # noqa: ANN401 - fields of FirecrackerConfig
) -> AsyncIterator[Stand]:
    """Start a VM, perhaps from a snapshot, and end all of it."""
    sandbox_id = f"f{uuid.uuid4().hex[:8]}_x"
    config = FirecrackerConfig(**{**installed(run_dir, version), **changes})
    record = VmRecord(sandbox_id=sandbox_id, config=config)
    Path(paths.vm_dir(sandbox_id)).mkdir(parents=True)
    cgroup.create(sandbox_id)
    removed: list[str] = []
    try:
        async with Workers() as workers:
            driver = FirecrackerDriver()
            machine = await driver.start(record, workers, removed.append, restoring)
            yield Stand(driver, record, machine, workers, removed)
            await asyncio.to_thread(cgroup.kill, sandbox_id)
            await machine.wait_end()
    finally:
        cgroup.kill(sandbox_id)
        mounts.unmount_below(paths.vm_dir(sandbox_id))


def disk(run_dir: Path, name: str, size: int = MIB) -> Path:
    file = run_dir / name
    file.write_bytes(bytes(size))
    return file


PCI: dict[str, Any] = {"block_device_driver": BlockDriver.VIRTIO_BLK}


@in_event_loop
async def test_a_vm_is_configured_started_and_reached_by_vsock(run_dir: Path) -> None:
    async with starting(run_dir) as stand:
        vm = stand.machine.vm
        assert (vm.version, vm.accelerator, await stand.machine.runstate()) == ("1.16.1", "kvm", "running")
        assert isinstance(vm.channel, HybridVsock)
        assert stat.S_ISSOCK(Path(vm.channel.socket).stat().st_mode)
        said = await stand.said()
        assert [line.split()[2] for line in said if line.startswith("-> PUT")][:4] == [
            "/machine-config",
            "/boot-source",
            "/vsock",
            "/entropy",
        ]
        assert said[-2:] == ["-> PUT /actions", "<- done"]
        assert len([line for line in said if line.startswith("-> PUT /drives/drive_")]) == 12


@in_event_loop
async def test_a_jail_has_a_user_of_its_own_and_nothing_of_the_host_that_the_vm_has_read(run_dir: Path) -> None:
    async with starting(run_dir) as one, starting(run_dir) as other:
        owners = {stand.root.stat().st_uid for stand in (one, other)}
        assert len(owners) == 2
        assert min(owners) >= 0x70000000
        assert mounts.mounted_below(str(one.root)) == []
        assert {file.name for file in one.root.iterdir()}.isdisjoint({"kernel", "initrd"})
        assert os.statvfs(one.root).f_blocks * 4096 <= 64 * MIB, "what it can write is bounded"


@in_event_loop
async def test_a_disk_on_pci_is_found_by_slot_and_serial_and_leaves_no_trace(run_dir: Path) -> None:
    async with starting(run_dir, **PCI) as stand:
        first = await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        second = await stand.machine.devices.add(stand.request(disk(run_dir, "b"), 7))
        assert (first.hypervisor_id, first.guest_path) == ("disk_1", "03")
        assert (second.hypervisor_id, second.guest_path) == ("disk_2", "04"), "the lowest free slot, whatever ours is"
        assert first.storage_options.endswith(",untold")
        assert first.storage_options != second.storage_options
        assert not (stand.root / "disk_1").exists(), "the node is there only while it is opened"
        await stand.ask("remove", slot=3)
        await stand.machine.devices.remove("disk_1")
        assert stand.removed == ["disk_1"]
        third = await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        assert (third.hypervisor_id, third.guest_path) == ("disk_3", "03")
        assert third.storage_options != first.storage_options, "the same file, another attach, another serial"
        assert [device.hypervisor_id for device in await stand.machine.devices.present()] == ["disk_2", "disk_3"]


@in_event_loop
async def test_a_disk_takes_the_place_of_a_placeholder_that_fits(run_dir: Path) -> None:
    async with starting(run_dir, "1.12.1", placeholder_drives=2, read_only_placeholder_drives=1) as stand:
        added = await stand.machine.devices.add(stand.request(disk(run_dir, "a"), 1))
        assert (added.hypervisor_id, added.guest_path) == ("disk_1", "/dev/vdb")
        assert added.storage_options.endswith(f",sectors={MIB // 512}")
        read_only = await stand.machine.devices.add(stand.request(disk(run_dir, "b"), is_read_only=True))
        assert read_only.guest_path == "/dev/vdc"
        files = await stand.ask("guest")
        assert files == {"drive_0": "placeholder", "drive_1": "disk_1", "drive_2": "disk_2"}
        await stand.machine.devices.remove("disk_1")
        assert (await stand.ask("guest"))["drive_1"] == "placeholder"
        assert stand.removed == ["disk_1"]


@pytest.mark.parametrize("changes", [PCI, {}], ids=["pci", "placeholders"])
@pytest.mark.parametrize("how", ["acted and refused", "refused"])
@in_event_loop
async def test_a_refused_disk_is_undone_whole(run_dir: Path, changes: dict[str, Any], how: str) -> None:
    async with starting(run_dir, **changes) as stand:
        verb = "PUT" if changes else "PATCH"
        await stand.ask("misbehave", what=f"{verb} /drives", how=how, times=1)
        with pytest.raises(HypervisorError, match="demanded"):
            await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        assert await stand.machine.devices.present() == []
        assert stand.record.devices == {}
        assert "400 Bad Request. Message: demanded" in stand.machine.log_tail()
        again = await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        assert again.hypervisor_id == "disk_2", "no id is used twice"


@in_event_loop
async def test_a_slot_that_is_taken_or_not_there_and_a_disk_that_is_none_are_refused(run_dir: Path) -> None:
    async with starting(run_dir, **PCI) as stand:
        await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        before = len(await stand.said())
        with pytest.raises(AlreadyExistsError, match="holds disk_1"):
            await stand.machine.devices.add(stand.request(disk(run_dir, "b")))
        with pytest.raises(UsageError, match="no slot 29"):
            await stand.machine.devices.add(stand.request(disk(run_dir, "b"), 29))
        with pytest.raises(UsageError, match="neither a regular file nor a block device"):
            await stand.machine.devices.add(stand.request(run_dir, 1))
        with pytest.raises(NotFoundError):
            await stand.machine.devices.remove("disk_9")
        assert len(await stand.said()) == before, "Firecracker was not asked"


@in_event_loop
async def test_the_next_manager_takes_over_and_settles_what_was_half_done(run_dir: Path) -> None:
    async with starting(run_dir, **PCI) as stand:
        await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        half = msgspec.structs.replace(stand.record.devices["disk_1"], slot=1, place="04")
        stand.record.devices["disk_2"], stand.record.next_device = half, 3
        stand.record.save()
        await stand.adopt()
        assert stand.removed == ["disk_2"]
        assert list(stand.record.devices) == ["disk_1"]
        await stand.machine.devices.remove("disk_1")
        assert (await stand.machine.devices.add(stand.request(disk(run_dir, "a")))).hypervisor_id == "disk_3"


@in_event_loop
async def test_a_vm_that_does_not_tell_its_disks_is_taken_over_all_the_same(run_dir: Path) -> None:
    async with starting(run_dir, **PCI) as stand:
        await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        await stand.ask("misbehave", what="GET /vm", how="refused", times=1)
        await stand.adopt()
        assert stand.removed == []
        assert [device.hypervisor_id for device in await stand.machine.devices.present()] == ["disk_1"]


async def counted(stand: Stand, startup_us: int) -> None:
    """Wait until the machine knows what Firecracker counts."""
    while stand.machine.counters.get("api_server", {}).get("process_startup_time_us") != startup_us:  # noqa: ASYNC110 - its own pace
        await asyncio.sleep(0)


@in_event_loop
async def test_what_firecracker_counts_is_known_also_after_a_line_that_was_cut(run_dir: Path) -> None:
    async with starting(run_dir) as stand:
        await counted(stand, 52000)
        assert stand.machine.counters == {
            "api_server": {"process_startup_time_us": 52000, "sync_response_fails": 0},
            "vcpu": {"exit_io_in": 3},
        }
        await stand.ask("count", text='{"api_server": {"process_start')
        await stand.ask("count", text='\n{"api_server": {"process_startup_time_us": 7}}\n')
        await counted(stand, 7)


@in_event_loop
async def test_what_firecracker_counts_is_in_its_managers_metrics() -> None:
    async with plugging("firecracker") as stand, BusClient() as bus:
        health = await bus.call(stand.manager.service, HEALTH, Empty(), timeout_s=30)
        vcpu = next(family for family in health.metrics if family.name == "kata_firecracker_vcpu")
        (sample,) = vcpu.samples
        assert (sample.labels, sample.value) == ({"sandbox_id": stand.sandbox_id, "item": "exit_io_in"}, 3)


@in_event_loop
async def test_what_firecracker_logs_is_in_our_log(run_dir: Path) -> None:
    with capture_logs() as logged:
        async with starting(run_dir) as stand:
            await stand.ask("log", line="WARN] a warning")
            while not [record for record in logged if "a warning" in record.get("said", "")]:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0)
            assert "a warning" in stand.machine.log_tail(), "and still where people look after its end"


@in_event_loop
async def test_a_vm_whose_jail_has_something_else_in_place_of_the_fifos_is_taken_over(run_dir: Path) -> None:
    async with starting(run_dir) as stand:
        for name in ("log", "metrics"):
            (stand.root / name).unlink()
            (stand.root / name).write_text("no FIFO\n")
        await stand.adopt()
        assert await stand.machine.runstate() == "running"


@pytest.mark.parametrize("changes", [PCI, {}], ids=["pci", "placeholders"])
@in_event_loop
async def test_what_a_dead_manager_asked_for_and_is_done_late_is_taken_out(
    run_dir: Path, changes: dict[str, Any]
) -> None:
    async with starting(run_dir, **changes) as stand:
        await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        stand.record.devices.clear()
        assert await stand.machine.devices.present() == []
        assert await stand.ask("has") == [[], []]
        again = await stand.machine.devices.add(stand.request(disk(run_dir, "a")))
        assert (again.hypervisor_id, again.guest_path) == ("disk_2", "03" if changes else "/dev/vda")


@in_event_loop
async def test_a_guest_that_panics_ends_the_vm_and_its_last_words_are_known(run_dir: Path) -> None:
    async with starting(run_dir) as stand:
        with pytest.raises(json.JSONDecodeError):
            await stand.ask("panic")
        await stand.machine.wait_end()
        assert not stand.machine.is_running
        assert "Kernel panic - not syncing: demanded" in await stand.machine.console_tail()
        assert await stand.driver.adopt(stand.record, stand.workers, stand.removed.append) is None


@in_event_loop
async def test_a_snapshot_is_written_by_one_jails_user_and_read_by_anothers(run_dir: Path) -> None:
    directory = run_dir / "snapshot"
    directory.mkdir(mode=0o700)
    async with starting(run_dir, **PCI) as stand:
        await stand.machine.pause()
        await stand.machine.snapshot(str(directory))
        config, version = stand.machine.config, stand.machine.vm.version
        restoring = Restoring(Snapshot(version=version, config=config, directory=str(directory)), MemoryMode.ON_DEMAND)
        assert mounts.mounted_below(str(stand.root)) == []
        async with starting(run_dir, restoring=restoring, **PCI) as other:
            assert other.root.stat().st_uid != stand.root.stat().st_uid
            assert await other.ask("memory") == "what the guest had in its memory"
            assert await other.machine.runstate() == "running"
            assert mounts.mounted_below(str(other.root)) == []
            assert not {"state", "memory"} & {file.name for file in other.root.iterdir()}
        for file in directory.iterdir():
            assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o644)
        wrong = Restoring(msgspec.structs.replace(restoring.snapshot, version="1.15.0"), MemoryMode.ON_DEMAND)
        with pytest.raises(UnsupportedError, match=r"1\.16\.1 cannot read a snapshot of 1\.15\.0"):
            async with starting(run_dir, restoring=wrong, **PCI):
                pass


@in_event_loop
async def test_without_a_jailer_the_same_works(run_dir: Path) -> None:
    async with starting(run_dir, jailer_path="", **PCI) as stand:
        assert stand.root.stat().st_uid == 0
        assert (await stand.machine.devices.add(stand.request(disk(run_dir, "a")))).guest_path == "03"


@pytest.mark.parametrize(
    ("version", "changes", "said"),
    [
        ("1.11.0", {}, "Firecracker 1.11.0 is not supported (install 1.12 or later"),
        ("1.15.1", PCI, "cannot plug disks on PCI, which 1.16 and later can (set hypervisor.firecracker.block_device"),
    ],
)
@in_event_loop
async def test_what_a_version_cannot_do_is_said_before_anything_is_started(
    run_dir: Path, version: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedError) as failure:
        async with starting(run_dir, version, **changes):
            pass
    assert said in str(failure.value)
    assert list(run_dir.glob("sandboxes/*/vm/*")) == []


@in_event_loop
async def test_without_kvm_that_is_said(run_dir: Path) -> None:
    programs = installed(run_dir, "1.16.1")
    verdict = {"boot_id": identity.boot_id(), "accelerator": "tcg", "reason": "there is no /dev/kvm"}
    (run_dir / "probe.json").write_bytes(msgspec.json.encode(verdict))
    record = VmRecord(sandbox_id="k", config=FirecrackerConfig(**programs))
    async with Workers() as workers:
        with pytest.raises(UnsupportedError, match="there is no /dev/kvm"):
            await FirecrackerDriver().start(record, workers, lambda _: None)


@in_event_loop
async def test_a_kernel_that_is_none_is_refused_in_firecrackers_words_and_one_that_nobody_may_read_in_ours(
    run_dir: Path,
) -> None:
    (run_dir / "bzImage").write_bytes(b"MZ")
    with pytest.raises(HypervisorError, match="Invalid Elf magic number"):
        async with starting(run_dir, kernel=str(run_dir / "bzImage")):
            pass
    (run_dir / "bzImage").chmod(0o600)
    with pytest.raises(UsageError, match="cannot be read by the user that a jailed VM runs as"):
        async with starting(run_dir, kernel=str(run_dir / "bzImage")):
            pass


@in_event_loop
async def test_a_jailer_that_refuses_is_quoted(run_dir: Path) -> None:
    (run_dir / "nojail").write_text("#!/bin/sh\necho it will not; exit 1\n")
    (run_dir / "nojail").chmod(0o755)
    with pytest.raises(HypervisorError, match="ended before it ran: it will not"):
        async with starting(run_dir, jailer_path=str(run_dir / "nojail")):
            pass
