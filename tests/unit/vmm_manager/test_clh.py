"""The pure parts of Cloud Hypervisor's driver: what it is asked for, what its words mean, where its slots are."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import ClhConfig
from common.errors import (
    AlreadyExistsError,
    ExhaustedError,
    HypervisorError,
    KataError,
    NotFoundError,
    StateError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from common.linux import landlock
from common.services.vmm import BlockSpec, BusKind, HotplugBus, PmemSpec
from procs.vmm_manager.drivers.cloud_hypervisor import devices, requests, topology
from procs.vmm_manager.drivers.cloud_hypervisor.api import is_refusal, meaning_of
from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement
from procs.vmm_manager.drivers.cloud_hypervisor.versions import features_of

ADD = ["Error from API", "The disk could not be added to the VM", "Error from device manager"]
BUS = HotplugBus(name="segment0", kind=BusKind.PCI, slots=29)
MORE = HotplugBus(name="segment1", kind=BusKind.PCI, slots=31)


@pytest.mark.parametrize(
    ("status", "said", "kind", "part"),
    [
        (500, [*ADD, "Failed to find device corresponding to the given identifier: _disk9"], NotFoundError, "_disk9"),
        (404, ["Error from API", "The VM info is not available", "VM is not created"], StateError, "not created"),
        (
            500,
            ["Error from API", "Cannot resume VM", "Invalid transition: InvalidStateTransition(Running, Running)"],
            StateError,
            "Running",
        ),
        (500, [*ADD, "Invalid identifier as it is not unique: d"], AlreadyExistsError, "not unique: d"),
        (
            500,
            [*ADD, "Cannot lock images of all block devices", "Failed to get Write lock for disk image: /d", "locked"],
            AlreadyExistsError,
            "/d",
        ),
        (
            500,
            [
                *ADD,
                "Failed to find an available PCI device ID",
                "Could not find an available device slot on the PCI bus",
            ],
            ExhaustedError,
            "slot",
        ),
        (500, "plain text of an old version", HypervisorError, "plain text"),
        (500, None, HypervisorError, "no reason is given"),
        (429, ["Too Many Requests"], UnavailableError, "Too Many"),
        (503, {"error": "Too many open connections"}, UnavailableError, "open connections"),
    ],
)
def test_a_refusal_is_told_by_its_root_cause(status: int, said: object, kind: type[KataError], part: str) -> None:
    meaning = meaning_of(status, said, "vm.add-disk")
    assert type(meaning) is kind
    assert meaning.message.startswith("Cloud Hypervisor refused vm.add-disk: ")
    assert part in meaning.message


def test_what_a_guest_may_have_had_a_hand_in_is_bounded_and_harmless() -> None:
    message = meaning_of(500, ["Error from API", "\x1b[2J" + "x" * 5000], "vm.add-disk").message
    assert "\x1b" not in message
    assert len(message) < 1100


def test_an_error_that_is_no_answer_is_no_refusal() -> None:
    assert not is_refusal(HypervisorError("it went away"))


@pytest.mark.parametrize(
    ("version", "is_slot_ours"), [("51.0.0", False), ("51.1", False), ("52.0.0", True), ("v54.0.0-12-g1a2b3c", True)]
)
def test_the_version_decides_what_is_used(version: str, is_slot_ours: bool) -> None:
    assert features_of(version).is_slot_ours is is_slot_ours


@pytest.mark.parametrize("version", ["50.2.0", "", "unknown"])
def test_what_is_too_old_or_no_version_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match="too old") as refused:
        features_of(version)
    assert "at least 51.0" in str(refused.value.hint)


def tree(*addresses: str) -> dict[str, Any]:
    wrappers = {f"_virtio-pci-{n}": {"pci_bdf": address, "children": []} for n, address in enumerate(addresses)}
    return {**wrappers, "__serial": {"children": []}}


def test_what_is_left_after_boot_is_for_hotplug() -> None:
    assert list(topology.pci_buses(tree("0000:00:01.0", "0000:00:02.0"), 1)) == [BUS]
    assert list(topology.pci_buses(tree("0000:00:02.0"), 2)) == [BUS, MORE]
    assert [topology.address([BUS, MORE], "segment0", slot) for slot in (0, 28)] == [(0, 3), (0, 31)]
    assert [topology.address([BUS, MORE], "segment1", slot) for slot in (0, 30)] == [(1, 1), (1, 31)]
    assert [topology.pci_path(bdf) for bdf in ("0000:00:1f.0", "0001:00:05.0")] == ["1f", "0001:05"]


@pytest.mark.parametrize(("bus", "slot"), [("segment0", 29), ("segment0", -1), ("segment1", 31), ("bridge0", 0)])
def test_a_slot_that_is_not_there_is_refused(bus: str, slot: int) -> None:
    with pytest.raises(UsageError, match=f"no slot {slot} on a hotplug bus '{bus}'"):
        topology.address([BUS, MORE], bus, slot)


@pytest.mark.parametrize("address", ["0000:01:05.0", "0000:00:05.1", "", "../x"])
def test_an_address_on_another_bus_is_refused(address: str) -> None:
    with pytest.raises(HypervisorError, match="on no bus of ours"):
        topology.pci_path(address)


def vm_config(config: ClhConfig) -> dict[str, Any]:
    return requests.vm_config(config, Confinement(config, "/vm"))


@pytest.mark.parametrize(("abi", "is_disabled", "is_on"), [(3, False, True), (3, True, False), (2, False, False)])
def test_it_is_confined_where_the_kernel_can_and_the_configuration_does_not_forbid(
    monkeypatch: pytest.MonkeyPatch, abi: int, is_disabled: bool, is_on: bool
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: abi)
    asked = vm_config(ClhConfig(disable_landlock=is_disabled))
    assert asked.get("landlock_enable", False) is is_on
    assert ({"path": "/vm", "access": "rw"} in asked.get("landlock_rules", [])) is is_on


def test_nothing_that_hurts_is_left_to_a_default() -> None:
    disk = requests.disk("/d", BlockSpec(source="/d", is_read_only=True), "s" * 20, ClhConfig())
    assert (disk["path"], disk["readonly"], disk["image_type"], disk["serial"]) == ("/d", True, "Raw", "s" * 20)
    assert "id" not in disk
    assert "id" not in requests.share("tag", "socket", ClhConfig())
    vm = vm_config(ClhConfig(default_memory=300, default_vcpus=2, kernel="/k", initrd="/i"))
    assert vm["memory"] == {"size": 300 << 20, "shared": True}
    assert vm["cpus"] == {"boot_vcpus": 2, "max_vcpus": 2}
    assert (vm["payload"]["kernel"], vm["payload"]["initramfs"]) == ("/k", "/i")
    assert (vm["console"]["mode"], vm["serial"]["mode"]) == ("Off", "Tty")


def test_what_others_serve_is_named_by_where_it_is() -> None:
    assert requests.host_device("0000:3b:00.0") == {"path": "/sys/bus/pci/devices/0000:3b:00.0"}
    assert requests.pmem("/m", PmemSpec(source="/m", is_read_only=True)) == {"file": "/m", "discard_writes": True}
    served = requests.vhost_user_disk("/s", "0f")
    assert (served["vhost_user"], served["vhost_socket"], served["serial"]) == (True, "/s", "0f")


def test_a_device_of_the_host_has_its_address_itself() -> None:
    found = {"_vfio3": {"pci_bdf": "0000:00:04.0"}, "_disk2": {"parent": "w"}, "w": {"pci_bdf": "0000:00:05.0"}}
    assert [devices.bdf_of(found, name) for name in ("_vfio3", "_disk2")] == ["0000:00:04.0", "0000:00:05.0"]


def test_cache_options_count_if_they_are_set_at_all() -> None:
    spec = BlockSpec(source="/d")
    assert not requests.disk("/d", spec, "", ClhConfig(block_device_cache_direct=True))["direct"]
    assert requests.disk("/d", spec, "", ClhConfig(block_device_cache_set=True, block_device_cache_direct=True))[
        "direct"
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["--seccomp", "true", "-v"]),
        ({"disable_seccomp": True, "hypervisor_loglevel": 0}, ["--seccomp", "false"]),
        ({"enable_debug": True}, ["--seccomp", "true", "-v", "-v", "-v"]),
    ],
)
def test_the_command_line(config: dict[str, Any], words: list[str]) -> None:
    argv = requests.argv(ClhConfig(path="/ch", **config), api_fd=5, events_fd=6)
    assert argv == ["/ch", "--api-socket", "fd=5", "--event-monitor", "fd=6", *words]


def test_debug_shows_what_the_guests_kernel_does() -> None:
    assert vm_config(ClhConfig(enable_debug=True))["payload"]["cmdline"].endswith(" debug")
    assert "debug" not in vm_config(ClhConfig())["payload"]["cmdline"]
