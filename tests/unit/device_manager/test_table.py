"""The devices of a sandbox: where each goes, who holds it, and what no two may share."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import msgspec
import pytest

from common import paths
from common.errors import (
    AlreadyExistsError,
    ExhaustedError,
    NotFoundError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from common.services.device import Attach, Device
from common.services.vmm import BlockDriver, BlockSpec, BusKind, DeviceSpec, HotplugBus, ShareSpec
from procs.device_manager.claims import Claims
from procs.device_manager.journal import Journal
from procs.device_manager.states import Action, Event, State
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
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    with Journal() as journal:
        yield journal


@pytest.fixture
def claims(journal: Journal) -> Iterator[Claims]:
    with Claims() as claims:
        yield claims


@pytest.fixture
def table(journal: Journal, claims: Claims) -> Table:
    return Table(journal, claims)


def wish(spec: DeviceSpec, sandbox_id: str = "s1", buses: tuple[HotplugBus, ...] = BUSES) -> Attach:
    return Attach(sandbox_id=sandbox_id, hypervisor="qemu", buses=buses, spec=spec, holder="c1")


def begin(table: Table, spec: DeviceSpec, sandbox_id: str = "s1", backing: str = "") -> Device:
    device, actions = table.begin(wish(spec, sandbox_id), backing)
    assert (device.state, actions) == (State.ATTACHING, (Action.ADD,))
    return device


def plugged(table: Table, spec: DeviceSpec = SCSI, backing: str = "file 1:1") -> Device:
    device = begin(table, spec, backing=backing)
    return table.apply(device.device_id, Event.ADDED, hypervisor_id="blk-1", guest_path="04/00")[0]


def quarantine(table: Table, device: Device) -> None:
    table.apply(device.device_id, Event.OVERDUE)
    assert table.apply(device.device_id, Event.PRESENT)[0].state == State.QUARANTINED


def places(table: Table, *specs: DeviceSpec) -> list[tuple[str, int]]:
    return [(device.bus, device.slot) for device in (begin(table, spec) for spec in specs)]


def test_each_gets_a_slot_of_a_bus_that_it_fits(table: Table) -> None:
    assert places(table, SCSI, SHARE, SCSI, BLK, SCSI) == [
        ("scsi0", 0),
        ("port0", 0),
        ("scsi0", 1),
        ("port1", 0),
        ("scsi0", 2),
    ]


def test_a_vm_without_such_a_bus_says_so(table: Table) -> None:
    with pytest.raises(UnsupportedError, match="VM of sandbox s1 has no hotplug bus for scsi devices"):
        table.begin(wish(SCSI, buses=BUSES[1:]), "")


def test_a_full_bus_says_by_what_and_leaves_the_others_free(table: Table) -> None:
    devices = [plugged(table), plugged(table), plugged(table)]
    table.release(devices[0].device_id, "c1", is_let_go=True)
    table.release(devices[1].device_id, "c1", is_let_go=True)
    quarantine(table, devices[1])
    with pytest.raises(
        ExhaustedError, match="no free scsi slot: of 3, 1 are held, 1 pending removal, 1 quarantined"
    ) as refused:
        begin(table, SCSI)
    assert refused.value.context == {"held": "1", "pending": "1", "quarantined": "1"}
    assert places(table, SHARE) == [("port0", 0)]
    assert begin(table, SCSI, "s2").bus == "scsi0", "another sandbox has buses of its own"


def test_a_wish_that_cannot_be_written_takes_neither_a_place_nor_the_file(
    table: Table, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "save", no_room)
        with pytest.raises(UnavailableError, match="cannot be wanted: no room"):
            begin(table, BLK, "s1", backing="file 1:1")
    assert begin(table, BLK, "s2", backing="file 1:1").slot == 0, "another sandbox may have the file"
    assert begin(table, BLK, "s1", backing="file 1:2").bus == "port0", "the place is free"


def test_of_the_free_slots_the_one_is_taken_that_was_free_longest(table: Table) -> None:
    first, second = begin(table, SCSI), begin(table, SCSI)
    table.apply(second.device_id, Event.UNREACHED)
    table.apply(first.device_id, Event.UNREACHED)
    assert places(table, SCSI, SCSI, SCSI) == [("scsi0", 2), ("scsi0", 1), ("scsi0", 0)]


def test_an_id_is_a_serial_that_fits_a_virtio_disk_and_sorts_by_age(table: Table) -> None:
    devices = [begin(table, SCSI) for _ in range(3)]
    assert [device.serial for device in devices] == sorted({device.device_id for device in devices})
    assert all(len(bytes.fromhex(device.serial)) == 10 and len(device.serial) == 20 for device in devices)


def test_a_source_belongs_to_one_device_of_a_sandbox(table: Table) -> None:
    device = plugged(table, BLK)
    other_name = BlockSpec(source="/dev/disk/by-id/the-same")
    assert table.holding(wish(other_name), "file 1:1") == device
    assert table.holding(wish(BLK), "file 1:2") is None
    with pytest.raises(
        AlreadyExistsError, match="attached read-write by virtio-blk and cannot also be attached read-only"
    ):
        table.holding(wish(BlockSpec(source="/disk", is_read_only=True)), "file 1:1")
    table.release(device.device_id, "c1", is_let_go=True)
    quarantine(table, device)
    with pytest.raises(AlreadyExistsError, match="which is quarantined"):
        table.holding(wish(BLK), "file 1:1")


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_disk_that_is_written_belongs_to_one_sandbox(table: Table, first: bool, second: bool) -> None:
    plugged(table, BlockSpec(source="/disk", is_read_only=first))
    with pytest.raises(AlreadyExistsError, match=r"/disk is held by device .* of sandbox s1"):
        begin(table, BlockSpec(source="/disk", is_read_only=second), "s2", backing="file 1:1")
    assert len(list(table)) == 1


def test_a_disk_that_is_only_read_may_be_in_many_sandboxes(table: Table) -> None:
    plugged(table, BlockSpec(source="/disk", is_read_only=True))
    begin(table, BlockSpec(source="/disk", is_read_only=True), "s2", backing="file 1:1")


def test_a_disk_that_is_gone_may_be_had_by_another_sandbox(table: Table) -> None:
    table.apply(plugged(table, BLK).device_id, Event.VM_ENDED)
    begin(table, BLK, "s2", backing="file 1:1")


def test_the_last_holder_takes_the_device_along(table: Table) -> None:
    device_id = plugged(table).device_id
    second = msgspec.structs.replace(wish(SHARE), holder="c2")
    assert table.hold(device_id, second)[1] == (Action.LEASE,)
    assert table.hold(device_id, second)[1] == (), "who holds it already changes nothing"
    confirmed, _ = table.confirm(device_id, "c2")
    assert [(holder.name, holder.is_confirmed) for holder in confirmed.holders] == [("c1", False), ("c2", True)]
    assert table.release(device_id, "c1", is_let_go=True)[0].state == State.ATTACHED
    assert table.release(device_id, "c1", is_let_go=True) == (table.known(device_id), ())
    gone, actions = table.release(device_id, "c2", is_let_go=True)
    assert (gone.state, gone.holders, gone.removals) == (State.DETACHING, (), 1)
    assert Action.REMOVE in actions
    assert table.release(device_id, "c2", is_let_go=True)[1] == (), "it is on its way out"


def test_who_does_not_hold_a_device_cannot_confirm_it(table: Table) -> None:
    device_id = plugged(table).device_id
    with pytest.raises(NotFoundError, match="has no holder 'c9'"):
        table.confirm(device_id, "c9")
    table.release(device_id, "c1", is_let_go=True)
    with pytest.raises(StateError, match="is detaching and cannot be confirmed by the guest"):
        table.confirm(device_id, "c1")
    with pytest.raises(NotFoundError, match="no device 'd9'"):
        table.confirm("d9", "c1")


def test_a_successor_finds_every_row_and_every_story(journal: Journal, claims: Claims, table: Table) -> None:
    device = plugged(table)
    ended = begin(table, SCSI)
    table.apply(ended.device_id, Event.UNREACHED)
    journal.__exit__(None, None, None)
    with Journal() as again:
        assert list(Table(again, claims)) == [device]
        story = again.story(ended.device_id)
        assert story is not None
        assert [(chapter.event, chapter.state) for chapter in story.chapters] == [
            ("wanted", "attaching"),
            ("not asked, the VM manager was away", "gone"),
        ]
        assert again.story("d9") is None
