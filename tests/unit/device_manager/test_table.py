"""Where a device goes: the first free slot of a bus that it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common import paths
from common.errors import ExhaustedError
from common.services.device import Attach
from common.services.vmm import BlockDriver, BlockSpec, BusKind, DeviceSpec, HotplugBus, ShareSpec
from procs.device_manager.journal import Journal
from procs.device_manager.states import Event
from procs.device_manager.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUSES = (
    HotplugBus(name="scsi0", kind=BusKind.SCSI, slots=3),
    HotplugBus(name="port0", kind=BusKind.PCI, slots=1),
    HotplugBus(name="port1", kind=BusKind.PCI, slots=1),
)
SCSI = BlockSpec(source="/disk", driver=BlockDriver.VIRTIO_SCSI)
BLK = BlockSpec(source="/disk")
SHARE = ShareSpec(source="/", tag="t")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    with Journal() as journal:
        yield Table(journal, lambda _: None)


def wish(spec: DeviceSpec, sandbox_id: str = "s1") -> Attach:
    return Attach(sandbox_id=sandbox_id, hypervisor="qemu", buses=BUSES, spec=spec)


def places(table: Table, *specs: DeviceSpec) -> list[tuple[str, int]]:
    devices = [table.begin(wish(spec)) for spec in specs]
    return [(device.bus, device.slot) for device in devices]


def test_each_gets_a_slot_of_a_bus_that_it_fits(table: Table) -> None:
    assert places(table, SCSI, SHARE, SCSI, BLK, SCSI) == [
        ("scsi0", 0),
        ("port0", 0),
        ("scsi0", 1),
        ("port1", 0),
        ("scsi0", 2),
    ]


def test_a_full_bus_says_by_whom_and_leaves_the_others_free(table: Table) -> None:
    places(table, SHARE, BLK)
    with pytest.raises(ExhaustedError, match=r"no free pci hotplug slot: 2 in all \(2 attaching\)"):
        table.begin(wish(BLK))
    assert places(table, SCSI) == [("scsi0", 0)]
    assert table.begin(wish(BLK, "s2")).bus == "port0", "another sandbox has buses of its own"


def test_a_slot_is_free_again_when_its_device_is_gone(table: Table) -> None:
    first = table.begin(wish(SCSI))
    places(table, SCSI)
    table.apply(first.device_id, Event.FAILED)
    assert places(table, SCSI) == [("scsi0", 0)]


def test_a_serial_fits_a_virtio_disk_and_is_of_one_attach(table: Table) -> None:
    serials = {table.begin(wish(SCSI)).serial for _ in range(3)}
    assert len(serials) == 3
    assert all(len(bytes.fromhex(serial)) == 10 and len(serial) == 20 for serial in serials)
