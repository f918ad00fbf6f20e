"""Which root file systems the guest mounts itself, and of what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.config import QemuConfig
from common.errors import UnsupportedError
from common.linux import loop
from common.protocols.agent import OVERLAY_DIRECTORY
from common.protocols.task import Mount
from common.services.vmm import BlockSpec
from procs.shim.disk import Disk
from procs.shim.rootfs import Root, on_disks

if TYPE_CHECKING:
    from pathlib import Path

USED = QemuConfig(disable_block_device_use=False)
GUEST = "/run/kata-containers/c1"


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return str(path)


def mount(source: str, *options: str, fstype: str = "ext4", target: str = "") -> Mount:
    return Mount(type=fstype, source=source, target=target, options=list(options))


def overlay(*options: str) -> Mount:
    return mount("overlay", *options, fstype="format/mkdir/overlay")


def test_a_file_that_wants_a_loop_device_is_a_disk(image: str) -> None:
    found = on_disks([mount(image, "loop", "noatime")], "c1", USED)
    path = f"{GUEST}/rootfs"
    disk = Disk(spec=BlockSpec(source=image), fstype="ext4", options=("noatime",), mount_point=path)
    assert found == Root(disks=[disk], path=path)


@pytest.mark.parametrize(("options", "fstype"), [(("ro", "loop"), "ext4"), (("loop",), "erofs"), ((), "erofs")])
def test_what_is_mounted_read_only_is_opened_for_reading(image: str, options: tuple[str, ...], fstype: str) -> None:
    found = on_disks([mount(image, *options, fstype=fstype)], "c1", USED)
    assert found is not None
    assert found.disks[0].spec.is_read_only


def test_a_device_mapper_snapshot_is_a_disk_by_whatever_name(image: str, tmp_path: Path) -> None:
    """containerd's devmapper names a link, and wants no loop device."""
    link = tmp_path / "pool-snap-1"
    with loop.device(image, is_read_only=False) as node:
        link.symlink_to(node)
        found = on_disks([mount(str(link), "nouuid", fstype="xfs")], "c1", USED)
    assert found is not None
    (disk,) = found.disks
    assert (disk.spec, disk.fstype, disk.options) == (BlockSpec(source=str(link)), "xfs", ("nouuid",))


def test_what_the_host_is_to_mount(image: str, tmp_path: Path) -> None:
    a_disk, layer = mount(image, "loop"), mount(image, "ro", "loop", fstype="erofs")
    assert on_disks([a_disk], "c1", QemuConfig()) is None, "upstream's default"
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
        [layer, overlay("upperdir=/host/fs", "workdir=/host/work", "lowerdir={{ mount 0 }}")],
        [mount(image, "loop", f"device={image}", fstype="erofs"), a_disk, overlay("lowerdir={{ overlay 0 1 }}")],
        [a_disk, mount("{{ mount 0 }}/upper", "rbind", fstype="format/bind")],
        [mount(str(tmp_path), "rbind", fstype="bind"), a_disk, overlay("lowerdir={{ overlay 0 1 }}")],
    ]
    assert [on_disks(rootfs, "c1", USED) for rootfs in others] == [None] * len(others)


def test_layers_that_are_disks_are_joined_by_the_guest(image: str) -> None:
    layer = mount(image, "ro", "loop", fstype="erofs")
    top = overlay(
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "upperdir={{ mount 0 }}/upper",
        "lowerdir={{ overlay 1 2 }}",
        "volatile",
    )
    found = on_disks([mount(image, "rw", "loop"), layer, layer, top], "c1", USED)
    assert found is not None
    assert [disk.mount_point for disk in found.disks] == [f"{GUEST}/layers/{number}" for number in range(3)]
    assert [disk.spec.is_read_only for disk in found.disks] == [False, True, True]
    (joined,) = found.storages
    assert (joined.driver, joined.fstype, joined.mount_point) == ("overlayfs", "overlay", found.path)
    assert joined.driver_options == [f"{OVERLAY_DIRECTORY}={GUEST}/layers/0/upper"]
    lower = f"lowerdir={GUEST}/layers/1:{GUEST}/layers/2"
    assert joined.options == [f"upperdir={GUEST}/layers/0/upper", lower, "volatile"]


def test_an_option_for_containerds_mount_manager_is_refused(image: str) -> None:
    verified = mount(image, "ro", "X-containerd.dmverity=/x", fstype="erofs")
    with pytest.raises(UnsupportedError, match=r"'X-containerd\.dmverity=/x' of the root") as refused:
        on_disks([verified], "c1", USED)
    assert "dmverity_mode" in str(refused.value.hint)
