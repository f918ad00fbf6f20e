"""What of the OCI configuration goes to the guest, and what is shared for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from common.errors import UsageError
from common.protocols import oci
from procs.shim import spec

SHARED = "/run/kata-containers/shared/containers/c1"

CONFIG: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "apparmorProfile": "docker-default"},
    "root": {"path": "rootfs", "readonly": True},
    "hooks": {"prestart": [{"path": "/bin/hook"}]},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/hosts", "options": ["rbind", "ro"]},
        {"destination": "/dev/fuse", "type": "bind", "source": "/dev/fuse", "options": ["bind"]},
        {"destination": "/data", "type": "none", "source": "/data", "options": ["bind", "rw"]},
        {"destination": "/disk", "type": "bind", "source": "/dev/mapper/disk", "options": ["bind", "ro"]},
    ],
    "linux": {
        "cgroupsPath": "system.slice:cri-containerd:c1",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "devices": [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16},
            {"path": "/dev/of-the-host", "type": "b", "major": 8, "minor": 32},
            {"path": "/dev/vfio/12", "type": "c", "major": 241, "minor": 3},
            {"path": "/dev/vfio/13", "type": "c", "major": 241, "minor": 4},
            {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196},
        ],
        "namespaces": [
            {"type": "pid"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "network", "path": "/run/netns/x"},
            {"type": "cgroup"},
            {"type": "time"},
            {"type": "mount"},
        ],
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": True, "type": "c", "major": 241, "minor": 3, "access": "rwm"},
                {"allow": True, "type": "c", "major": 10, "minor": 196, "access": "rwm"},
                {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "r"},
                {"allow": True, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
                {"allow": True, "type": "b", "major": 9, "minor": 0, "access": "rwm"},
                {"allow": False, "type": "b", "major": 8, "minor": 32, "access": "rwm"},
                {"allow": True, "type": "b", "access": "m"},
            ],
            "blockIO": {
                "weight": 10,
                "throttleReadBpsDevice": [{"major": 8, "minor": 32, "rate": 1}],
                "throttleWriteIOPSDevice": [
                    {"major": 8, "minor": 16, "rate": 100},
                    {"major": 8, "minor": 32, "rate": 1},
                ],
            },
            "network": {"classID": 1},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.high": "1000"},
            "pids": {"limit": 10},
            "memory": {"limit": 1 << 20},
            "cpu": {"shares": 1024, "cpus": "0-1", "mems": "0"},
        },
        "maskedPaths": ["/proc/kcore"],
    },
}


VFIO = {(241, 3): "12", (241, 4): "13", (10, 196): "vfio"}


def cut(config: dict[str, Any] = CONFIG, *, is_seccomp_wanted: bool = False) -> spec.ForGuest:
    return spec.for_guest(
        copy.deepcopy(config),
        "c1",
        is_seccomp_wanted=is_seccomp_wanted,
        is_disk=lambda path: path.startswith("/dev/mapper/"),
        vfio_name=lambda major, minor: VFIO.get((major, minor), ""),
    )


def test_what_is_about_the_host_is_cut() -> None:
    told = cut().config
    linux = told["linux"]
    assert "hooks" not in told
    assert "seccomp" not in linux
    assert [device["path"] for device in linux["devices"]] == ["/dev/fuse", "/dev/sda", "/dev/sdb"]
    assert "apparmorProfile" not in told["process"]
    assert linux["cgroupsPath"] == "/c1"
    assert linux["namespaces"] == [{"type": "ipc"}, {"type": "mount"}]
    resources = linux["resources"]
    assert resources.pop("devices") == [
        {"allow": False, "type": "a", "major": -1, "minor": -1, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "r"},
        {"allow": True, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
        {"allow": True, "type": "b", "major": -1, "minor": -1, "access": "m"},
    ], "of disks, those that become the guest's"
    assert resources.pop("blockIO") == {"throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 100}]}
    assert resources == {
        "memory": {"limit": 1 << 20},
        "cpu": {"shares": 1024},
        "pids": {"limit": 10},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"memory.high": "1000"},
    }
    assert resources == spec.limits(CONFIG["linux"]["resources"]), "an update changes no device rules"


def test_what_is_about_the_container_stays() -> None:
    told = cut().config
    assert told["process"] == {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    assert told["root"] == {"path": f"{SHARED}/rootfs", "readonly": True}
    assert told["linux"]["maskedPaths"] == ["/proc/kcore"]
    assert oci.from_json(oci.Spec, told).root == oci.Root(path=f"{SHARED}/rootfs", readonly=True)


def test_host_paths_are_shared_and_the_kernels_are_the_guests_own() -> None:
    found = cut()
    assert [mount["source"] for mount in found.config["mounts"]] == [
        "proc",
        f"{SHARED}/mounts/0",
        "/dev/fuse",
        f"{SHARED}/mounts/1",
        "/run/kata-containers/c1/volumes/0",
    ]
    assert found.mounts == [
        spec.HostMount(name="mounts/0", source="/var/lib/hosts", is_recursive=True, is_readonly=True),
        spec.HostMount(name="mounts/1", source="/data", is_recursive=False, is_readonly=False),
    ]


def test_a_block_device_in_the_place_of_a_mount() -> None:
    disk = spec.HostMount(name="volumes/0", source="/dev/mapper/disk", is_recursive=False, is_readonly=True)
    assert cut().volumes == [disk]


def test_block_devices_that_a_rule_names_and_no_others() -> None:
    assert cut().devices == [
        spec.HostDevice(path="/dev/sda", major=8, minor=0, is_readonly=True),
        spec.HostDevice(path="/dev/sdb", major=8, minor=16, is_readonly=False),
    ]


def test_a_privileged_container_gets_no_disk_that_it_was_not_given_by_name() -> None:
    everything = {**CONFIG["linux"], "resources": {"devices": [{"allow": True, "access": "rwm"}]}}
    found = cut({**CONFIG, "linux": everything})
    assert (found.devices, found.groups) == ([], [])
    assert [device["path"] for device in found.config["linux"]["devices"]] == ["/dev/fuse"]


def test_of_vfio_a_guest_gets_groups_that_a_rule_names_and_no_node() -> None:
    found = cut()
    assert found.groups == [spec.HostGroup(path="/dev/vfio/12", name="12")], "neither 13 nor the container of groups"
    linux = found.config["linux"]
    assert [device["path"] for device in linux["devices"]] == ["/dev/fuse", "/dev/sda", "/dev/sdb"]
    numbers = {(rule["major"], rule["minor"]) for rule in linux["resources"]["devices"] if rule["type"] == "c"}
    assert numbers == {(10, 229)}, "those numbers are other devices in the guest, or none"


def test_the_given_configuration_is_not_changed() -> None:
    given = copy.deepcopy(CONFIG)
    spec.for_guest(given, "c1", is_disk=lambda _: False, vfio_name=lambda *_: "12")
    assert given == CONFIG


def test_a_configuration_without_a_process_is_refused() -> None:
    with pytest.raises(UsageError, match="container c1 has no process"):
        cut({"ociVersion": "1.0.2"})


def test_a_bare_configuration_is_enough() -> None:
    found = cut({"process": {}})
    assert (found.config["mounts"], found.mounts, found.volumes, found.devices) == ([], [], [], [])


def test_a_seccomp_profile_goes_to_the_guest_if_it_is_wanted() -> None:
    told = cut(is_seccomp_wanted=True).config
    assert told["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}
