"""Firecracker, what is pure of it: versions, errors, places."""

from __future__ import annotations

import pytest

from common.config import BlockDriver, FirecrackerConfig
from common.errors import AlreadyExistsError, HypervisorError, NotFoundError, UnsupportedError
from common.services.vmm import BlockSpec, BusKind
from procs.vmm_manager.drivers.firecracker import boot, places, versions
from procs.vmm_manager.drivers.firecracker.api import refusal
from procs.vmm_manager.drivers.firecracker.metrics import counters
from procs.vmm_manager.record import DeviceRecord


def device(bus: str, slot: int) -> DeviceRecord:
    return DeviceRecord(bus=bus, slot=slot, serial="", spec=BlockSpec(source="/a"))


@pytest.mark.parametrize(
    ("version", "can"), [("1.12.1", False), ("1.15.1", False), ("1.16.0", True), ("1.17.0-dev", True), ("2.0.0", True)]
)
def test_disks_can_be_plugged_on_pci_since_1_16(version: str, *, can: bool) -> None:
    assert versions.features(version).has_pci_hotplug is can


@pytest.mark.parametrize("version", ["1.11.9", "0.25", ""])
def test_what_is_older_than_1_12_or_no_version_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"install 1\.12 or later"):
        versions.features(version)


def test_the_version_is_read_from_what_the_program_prints() -> None:
    assert versions.printed("Firecracker v1.16.1\n\nSupported snapshot data format versions: …\n") == "1.16.1"
    assert versions.printed("usage: something else") == ""


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Device not found", NotFoundError),
        ("Device ID in use", AlreadyExistsError),
        ("PCI is not enabled", UnsupportedError),
        ("Start microvm error: whatever", HypervisorError),
    ],
)
def test_a_refusal_is_known_by_its_words_and_quoted(said: str, kind: type[Exception]) -> None:
    error = refusal("PUT /drives/disk_1", said)
    assert type(error) is kind
    assert error.message == f"Firecracker refused PUT /drives/disk_1: {said}"


def test_on_pci_a_disk_gets_the_lowest_slot_that_no_other_has() -> None:
    ways = places.PciPlaces()
    (bus,) = ways.buses
    taken: list[str] = []
    for slot in range(bus.slots):
        taken.append(ways.place(device(bus.name, bus.slots - 1 - slot), taken))
    assert taken == [f"{slot:02x}" for slot in range(3, 32)]
    assert ways.place(device(bus.name, 0), taken[:4] + taken[5:]) == "07"


def test_placeholders_are_named_in_the_order_of_the_boot_whatever_their_bus() -> None:
    config = FirecrackerConfig(placeholder_drives=3, read_only_placeholder_drives=2)
    ways = places.of(config)
    kinds = [(bus.kind, bus.slots) for bus in ways.buses]
    assert kinds == [(BusKind.MMIO, 3), (BusKind.MMIO_READ_ONLY, 2), (BusKind.MMIO_NETWORK, 10)]
    names = [ways.place(device(bus.name, slot), ()) for bus in ways.buses[:2] for slot in range(bus.slots)]
    assert names == [f"/dev/vd{letter}" for letter in "abcde"]
    assert ways.place(device("interfaces", 0), ()) == "", "the guest knows it by its address"
    assert boot.placeholders(config) == [False, False, False, True, True]


def test_a_vm_is_configured_with_paths_in_its_jail_only() -> None:
    for driver in (BlockDriver.VIRTIO_MMIO, BlockDriver.VIRTIO_BLK):
        for request in boot.requests(FirecrackerConfig(block_device_driver=driver, kernel="/host/vmlinux")):
            paths = [value for key, value in request.body.items() if "path" in key]
            assert not any(str(path).startswith("/") for path in paths), request


def test_the_kernel_resets_by_the_keyboard_controller_and_the_configurations_parameters_win() -> None:
    requests = {request.path: request.body for request in boot.requests(FirecrackerConfig(kernel_params="reboot=t"))}
    arguments = str(requests["/boot-source"]["boot_args"]).split()
    assert arguments.index("reboot=k") < arguments.index("reboot=t")


def test_counters_are_the_groups_that_are_known_and_of_these_what_is_a_number() -> None:
    line = b"""{"utc_timestamp_ms": 1764012345678,
        "vcpu": {"exit_io_in": 3, "failures": 0, "exit_io_in_agg": {"min_us": 1}},
        "block": {"Read Count": 1, "flush_count": -1, "read_bytes": 1e3, "is": true, "huge": 18446744073709551616},
        "block_disk_1": {"read_count": 7}, "vmm": 5, "unheard_of": {"a": 1}}"""
    assert counters(line) == {"vcpu": {"exit_io_in": 3, "failures": 0}, "block": {}, "vmm": {}}


def test_a_group_is_bounded() -> None:
    items = ", ".join(f'"a{number}": 1' for number in range(1000))
    told = counters(f'{{"net": {{{items}}}}}'.encode())
    assert told is not None
    assert len(told["net"]) == 128


@pytest.mark.parametrize("line", [b"", b'{"vcpu": {"exit_io', b"[]", b"\xff", b"[" * 100_000])
def test_a_line_that_says_nothing_is_none(line: bytes) -> None:
    assert counters(line) is None
