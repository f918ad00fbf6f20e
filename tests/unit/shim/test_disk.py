"""Which root file systems the guest mounts itself, which disks it has else, and what its agent is told of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from common.config import BlockDriver, QemuConfig
from common.errors import NotFoundError
from common.linux import loop
from common.protocols import agent
from common.protocols.task import Mount
from common.services.device import Device
from common.services.vmm import BlockSpec
from procs.shim import disk
from procs.shim.spec import HostDevice, HostMount

if TYPE_CHECKING:
    from collections.abc import Iterator

USED = QemuConfig(disable_block_device_use=False)
PLUGGED = Device(
    device_id="5" * 20, sandbox_id="s", hypervisor="qemu", bus="b", slot=2, guest_path="04/02", state="plugged",
    since=0.0,
)  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return str(path)


def mount(source: str, *options: str, fstype: str = "ext4", target: str = "") -> Mount:
    return Mount(type=fstype, source=source, target=target, options=list(options))


@pytest.fixture
def node(image: str) -> Iterator[str]:
    """A block device of the host."""
    with loop.device(image, is_read_only=False) as path:
        yield path


def test_a_file_that_wants_a_loop_device_is_a_disk(image: str) -> None:
    found = disk.of_root([mount(image, "loop", "noatime")], "c1", USED)
    assert found == disk.Disk(
        spec=BlockSpec(source=image, is_read_only=False),
        fstype="ext4",
        options=("noatime",),
        mount_point="/run/kata-containers/c1/rootfs",
    )


@pytest.mark.parametrize(("options", "fstype"), [(("ro", "loop"), "ext4"), (("loop",), "erofs"), ((), "erofs")])
def test_what_is_mounted_read_only_is_opened_for_reading(image: str, options: tuple[str, ...], fstype: str) -> None:
    found = disk.of_root([mount(image, *options, fstype=fstype)], "c1", USED)
    assert found is not None
    assert found.spec.is_read_only


def test_what_the_host_is_to_mount(image: str, tmp_path: Path) -> None:
    a_disk = mount(image, "loop")
    assert disk.of_root([a_disk], "c1", QemuConfig()) is None, "upstream's default"
    others = [
        [],
        [a_disk, a_disk],
        [mount(image)],
        [mount(image, "loop", fstype="btrfs")],
        [mount(image, "loop", target="/data")],
        [mount(str(tmp_path), "rbind", fstype="bind")],
        [mount("overlay", "lowerdir=/a:/b", fstype="overlay")],
        [mount(f"{image}x", "loop")],
        [mount("/dev/null", "loop")],
    ]
    assert [disk.of_root(rootfs, "c1", USED) for rootfs in others] == [None] * len(others)


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (BlockDriver.VIRTIO_BLK, ("blk", "04/02")),
        (BlockDriver.VIRTIO_SCSI, ("scsi", "0:2")),
        (BlockDriver.VIRTIO_MMIO, ("mmioblk", "/dev/vda")),
    ],
)
def test_the_agent_is_told_place_and_serial(image: str, driver: BlockDriver, told: tuple[str, str]) -> None:
    config = QemuConfig(disable_block_device_use=False, block_device_driver=driver)
    found = disk.of_root([mount(image, "loop", "ro")], "c1", config)
    assert found is not None
    plugged = msgspec.structs.replace(PLUGGED, guest_path=told[1])
    storage = found.storage(plugged)
    assert (storage.driver, storage.source) == told
    assert storage.driver_options == ["serial=" + "5" * 20]
    another = msgspec.structs.replace(plugged, storage_options="serial=7,untold")
    assert found.storage(another).driver_options == ["serial=7", "untold"], "the hypervisor has a serial of its own"
    assert (storage.fstype, storage.options, storage.mount_point) == ("ext4", ["ro"], found.mount_point)


def test_a_device_mapper_snapshot_is_a_disk_by_whatever_name(node: str, tmp_path: Path) -> None:
    """containerd's devmapper names a link, and wants no loop device."""
    link = tmp_path / "pool-snap-1"
    link.symlink_to(node)
    found = disk.of_root([mount(str(link), "nouuid", fstype="xfs")], "c1", USED)
    assert found is not None
    assert (found.spec, found.fstype) == (BlockSpec(source=str(link)), "xfs")
    assert found.options == ("nouuid",)


def test_a_block_device_in_the_place_of_a_mount() -> None:
    volume = HostMount(name="volumes/0", source="/dev/x", is_recursive=False, is_readonly=True)
    found = disk.of_volume(volume, "c1", BlockDriver.VIRTIO_SCSI)
    assert found.spec == BlockSpec(source="/dev/x", is_read_only=True, driver=BlockDriver.VIRTIO_SCSI)
    told = found.storage(PLUGGED)
    assert (told.driver, told.source, told.fstype, told.options) == ("scsi", "04/02", "bind", ["bind"])
    assert told.mount_point == "/run/kata-containers/c1/volumes/0"


def test_a_device_node_is_found_on_the_host_by_its_number(node: str) -> None:
    number = Path(node).stat().st_rdev
    device = HostDevice(path="/dev/data", major=os.major(number), minor=os.minor(number), is_readonly=False)
    found = disk.of_device(device, BlockDriver.VIRTIO_BLK)
    assert found.spec == BlockSpec(source=node)
    assert found.device(PLUGGED) == agent.Device(
        id="04/02", type="blk", container_path="/dev/data", options=["serial=" + "5" * 20]
    )


def test_a_device_node_without_a_device_is_said() -> None:
    nothing = HostDevice(path="/dev/data", major=4095, minor=7, is_readonly=False)
    with pytest.raises(NotFoundError, match="device /dev/data: the host has no block device 4095:7"):
        disk.of_device(nothing, BlockDriver.VIRTIO_BLK)
