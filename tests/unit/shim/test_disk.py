"""Which disks a container has beside its root file system, and what the agent is told of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from common.config import BlockDriver
from common.errors import NotFoundError
from common.linux import loop
from common.protocols import agent
from common.services.device import Device
from common.services.vmm import BlockSpec
from procs.shim import disk
from procs.shim.spec import HostDevice, HostMount

if TYPE_CHECKING:
    from collections.abc import Iterator

PLUGGED = Device(
    device_id="5" * 20, sandbox_id="s", hypervisor="qemu", bus="b", slot=2, guest_path="04/02", state="plugged",
    since=0.0,
)  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    """A block device of the host."""
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    with loop.device(str(image), is_read_only=False) as path:
        yield path


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (BlockDriver.VIRTIO_BLK, ("blk", "04/02")),
        (BlockDriver.VIRTIO_SCSI, ("scsi", "0:2")),
        (BlockDriver.VIRTIO_MMIO, ("mmioblk", "/dev/vda")),
    ],
)
def test_the_agent_is_told_place_and_serial(driver: BlockDriver, told: tuple[str, str]) -> None:
    found = disk.Disk(spec=BlockSpec(source="/x", driver=driver), fstype="ext4", options=("ro",), mount_point="/y")
    plugged = msgspec.structs.replace(PLUGGED, guest_path=told[1])
    storage = found.storage(plugged)
    assert (storage.driver, storage.source) == told
    assert storage.driver_options == ["serial=" + "5" * 20]
    another = msgspec.structs.replace(plugged, storage_options="serial=7,untold")
    assert found.storage(another).driver_options == ["serial=7", "untold"], "the hypervisor has a serial of its own"
    assert (storage.fstype, storage.options, storage.mount_point) == ("ext4", ["ro"], "/y")


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
