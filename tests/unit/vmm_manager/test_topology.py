"""Where devices go in a QEMU VM: what callers are told, QEMU is told, and the guest sees, agree."""

from __future__ import annotations

import itertools
import os

import pytest

from common.config import BlockDriver, QemuConfig
from common.errors import UsageError
from common.services.vmm import BusKind, HotplugBus
from procs.vmm_manager.drivers.qemu.topology import Topology

ALL = QemuConfig(default_bridges=5, pcie_root_port=16, block_device_driver=BlockDriver.VIRTIO_SCSI)


def devices(topology: Topology) -> list[dict[str, str]]:
    """Return QEMU's devices by their properties."""
    arguments = list(topology.arguments())
    assert set(arguments[::2]) == {"-device"}
    return [dict(_pair(option) for option in device.split(",")) for device in arguments[1::2]]


def _pair(option: str) -> tuple[str, str]:
    name, _, value = option.rpartition("=")
    return name or "driver", value


def test_the_default_is_one_bridge_which_holds_thirty() -> None:
    topology = Topology(QemuConfig())
    assert topology.buses == (HotplugBus(name="bridge0", kind=BusKind.PCI, slots=30),)
    assert [device["driver"] for device in devices(topology)] == ["pci-bridge"]


@pytest.mark.parametrize(("wanted", "made"), [(0, 1), (1, 1), (5, 5), (6, 5), (-1, 1)])
def test_the_number_of_bridges_is_corrected_as_upstream_does(wanted: int, made: int) -> None:
    assert len(Topology(QemuConfig(default_bridges=wanted)).buses) == made


def test_no_two_devices_share_an_address_or_a_chassis() -> None:
    made = devices(Topology(ALL))
    addresses = [int(device["addr"], 16) for device in made]
    assert len(set(addresses)) == len(made) == 22
    assert all(0 < address < 0x1F for address in addresses), "0 is the host bridge, 0x1f the chipset's"
    assert 3 not in addresses, "which is the channel's"
    for kind, chassis in (("pci-bridge", "chassis_nr"), ("pcie-root-port", "chassis")):
        numbers = [device[chassis] for device in made if device["driver"] == kind]
        assert len(set(numbers)) == len(numbers)
        assert "0" not in numbers


def test_a_disk_is_where_the_guest_is_told_that_it_is() -> None:
    topology, made = Topology(ALL), devices(Topology(ALL))
    slots = {device["id"]: int(device["addr"], 16) for device in made}
    for bus in topology.buses:
        for slot in (0, bus.slots - 1):
            place = topology.place(bus.name, slot)
            if bus.kind in (BusKind.PCI, BusKind.PCIE):
                path = [int(part, 16) for part in place.guest_path.split("/")]
                assert path == [slots[bus.name], int(str(place.arguments["addr"]), 16)]
            else:
                assert place.guest_path == f"{place.arguments['scsi-id']}:{place.arguments['lun']}"


def test_root_ports_are_for_devices_that_need_one() -> None:
    buses = Topology(QemuConfig(pcie_root_port=2)).buses
    assert [(bus.name, bus.kind, bus.slots) for bus in buses[1:]] == [
        ("port0", BusKind.PCIE, 1),
        ("port1", BusKind.PCIE, 1),
    ]


def test_the_units_of_scsi_are_numbered_as_upstream_does() -> None:
    arguments = Topology(ALL).place("scsi0.0", 7).arguments
    assert dict(arguments) == {"bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": 7}


def test_places_of_a_bus_differ() -> None:
    topology = Topology(ALL)
    places = [topology.place(bus.name, slot) for bus in topology.buses for slot in range(bus.slots)]
    keys = [tuple(sorted((k, str(v)) for k, v in place.arguments.items())) for place in places]
    assert all(count == 1 for count in (len(list(group)) for _, group in itertools.groupby(sorted(keys))))


@pytest.mark.parametrize(("bus", "slot"), [("bridge0", 30), ("bridge0", -1), ("bridge1", 0), ("", 0)])
def test_what_is_not_there_is_refused_with_what_is(bus: str, slot: int) -> None:
    with pytest.raises(UsageError, match="bridge0 with 30"):
        Topology(QemuConfig()).place(bus, slot)


def test_processors_and_memory_that_may_come_are_places_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    config = QemuConfig(default_vcpus=2, default_maxvcpus=6, default_memory=512, default_maxmemory=1024, memory_slots=3)
    topology = Topology(config)
    assert topology.buses[1:] == (
        HotplugBus(name="cpus", kind=BusKind.CPU, slots=4),
        HotplugBus(name="memory", kind=BusKind.MEMORY, slots=3),
    )
    assert dict(topology.place("memory", 2).arguments) == {"slot": 2}
    assert len(devices(topology)) == 1, "they need no device of QEMU"


@pytest.mark.parametrize(("wanted", "most"), [(0, 2), (4, 4), (9, 8), (1, 2)])
def test_a_vm_has_those_of_its_boot_and_at_most_the_hosts_processors(
    monkeypatch: pytest.MonkeyPatch, wanted: int, most: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert QemuConfig(default_vcpus=2, default_maxvcpus=wanted).max_vcpus == most
