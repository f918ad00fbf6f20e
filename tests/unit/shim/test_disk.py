"""Which root file systems the guest mounts itself, and what its agent is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from common.config import BlockDriver, QemuConfig
from common.protocols.task import Mount
from common.services.device import Device
from common.services.vmm import BlockSpec
from procs.shim import disk

if TYPE_CHECKING:
    from pathlib import Path

USED = QemuConfig(disable_block_device_use=False)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return str(path)


def mount(source: str, *options: str, fstype: str = "ext4", target: str = "") -> Mount:
    return Mount(type=fstype, source=source, target=target, options=list(options))


def test_a_file_that_wants_a_loop_device_is_a_disk(image: str) -> None:
    found = disk.of([mount(image, "loop", "noatime")], "c1", USED)
    assert found == disk.Disk(
        spec=BlockSpec(source=image, is_read_only=False),
        fstype="ext4",
        options=("noatime",),
        mount_point="/run/kata-containers/c1/rootfs",
    )


@pytest.mark.parametrize(("options", "fstype"), [(("ro", "loop"), "ext4"), (("loop",), "erofs"), ((), "erofs")])
def test_what_is_mounted_read_only_is_opened_for_reading(image: str, options: tuple[str, ...], fstype: str) -> None:
    found = disk.of([mount(image, *options, fstype=fstype)], "c1", USED)
    assert found is not None
    assert found.spec.is_read_only


def test_what_the_host_is_to_mount(image: str, tmp_path: Path) -> None:
    a_disk = mount(image, "loop")
    assert disk.of([a_disk], "c1", QemuConfig()) is None, "upstream's default"
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
    assert [disk.of(rootfs, "c1", USED) for rootfs in others] == [None] * len(others)


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
    found = disk.of([mount(image, "loop", "ro")], "c1", config)
    assert found is not None
    plugged = Device(
        device_id="5" * 20, sandbox_id="s", hypervisor="qemu", bus="b", slot=2, guest_path=told[1], state="plugged",
        since=0.0,
    )  # fmt: skip
    storage = found.storage(plugged)
    assert (storage.driver, storage.source) == told
    assert storage.driver_options == ["serial=" + "5" * 20]
    another = msgspec.structs.replace(plugged, storage_options="serial=7,untold")
    assert found.storage(another).driver_options == ["serial=7", "untold"], "the hypervisor has a serial of its own"
    assert (storage.fstype, storage.options, storage.mount_point) == ("ext4", ["ro"], found.mount_point)
