"""A root file system of layers, as containerd leaves it to the shim: joined by the host, or from disks by the guest."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import toml

from common import paths
from common.errors import KataError
from common.linux import mounts
from common.protocols import task
from common.protocols.agent import CreateContainerRequest
from common.services.vmm import BlockSpec
from common.testing.shim_client import started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_client import Shim
    from common.testing.shim_stand import ShimStand


@dataclass(frozen=True)
class Images:
    """Layers: ``lower`` and ``middle`` each have a file of their name, ``writable`` is empty."""

    lower: Path
    middle: Path
    writable: Path


def make_images(stand: ShimStand) -> Images:
    images = Images(*(stand.root / name for name in ("lower", "middle", "writable")))
    for image in (images.lower, images.middle):
        content = stand.root / f"content-{image.name}"
        content.mkdir()
        (content / image.name).write_text(image.name)
        subprocess.run(["/usr/bin/mkfs.erofs", "--quiet", str(image), str(content)], check=True)
    make_writable(images.writable)
    return images


def make_writable(image: Path, *options: str) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", *options, str(image), "8M"], check=True)


def layer(image: Path) -> task.Mount:
    return task.Mount(type="erofs", source=str(image), target="", options=["ro", "loop"])


def overlay(*options: str) -> task.Mount:
    return task.Mount(type="format/mkdir/overlay", source="overlay", target="", options=list(options))


def block_mode(images: Images) -> list[task.Mount]:
    """Return the mounts of containerd's erofs snapshotter with ``default_size``."""
    made = ("upper", "work")
    return [
        task.Mount(type="ext4", source=str(images.writable), target="", options=["rw", "loop"]),
        layer(images.middle),
        layer(images.lower),
        overlay(
            *(f"X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}:0755" for name in made),
            *(f"{name}dir={{{{ mount 0 }}}}/{name}" for name in made),
            "lowerdir={{ overlay 1 2 }}",
        ),
    ]


async def create(stand: ShimStand, shim: Shim, rootfs: list[task.Mount]) -> CreateContainerRequest:
    request = stand.create_request("true")
    request.rootfs = rootfs
    await stand.call(shim.client, "Create", request, task.PidResponse)
    assert stand.vms.guest is not None
    (asked,) = [call for _, call in stand.vms.guest.calls if isinstance(call, CreateContainerRequest)]
    return asked


def root_of(stand: ShimStand) -> Path:
    return Path(paths.mounts_dir(stand.id), stand.id, "rootfs")


@stand_test
async def test_the_host_joins_layers(stand: ShimStand) -> None:
    images = make_images(stand)
    await create(stand, await started(stand), block_mode(images))
    root = root_of(stand)
    assert {entry.name for entry in root.iterdir()} == {"lower", "middle"}
    (root / "written").write_text("kept")
    layers = Path(paths.layers_dir(stand.id), stand.id)
    assert (layers / "0/upper/written").read_text() == "kept"
    exported = mounts.mounted_below(paths.share_dir(stand.id))
    assert [Path(point).name for point in exported] == ["rootfs", "share"], "the guest sees what is joined"


@stand_test
async def test_layers_below_a_directory_of_the_host(stand: ShimStand) -> None:
    images = make_images(stand)
    upper, work = stand.root / "fs", stand.root / "work"
    upper.mkdir()
    work.mkdir()
    top = overlay(f"workdir={work}", f"upperdir={upper}", "lowerdir={{ mount 0 }}")
    await create(stand, await started(stand), [layer(images.lower), top])
    (root_of(stand) / "written").write_text("kept")
    assert (upper / "written").read_text() == "kept"


@stand_test
async def test_a_link_that_a_guest_may_have_made_in_a_layer_leads_nowhere(stand: ShimStand) -> None:
    images, content, outside = make_images(stand), stand.root / "content", stand.root / "outside"
    outside.mkdir()
    content.mkdir()
    (content / "upper").symlink_to(outside)
    make_writable(images.writable, "-d", str(content))
    with pytest.raises(KataError, match=r"cannot make directory .*/layers/.*/0/upper of the root file system"):
        await create(stand, await started(stand), block_mode(images))


@stand_test
async def test_the_guest_joins_layers_that_are_disks(stand: ShimStand) -> None:
    config = toml.loads(stand.config.read_text())
    config["hypervisor"]["qemu"]["disable_block_device_use"] = False
    stand.config.write_text(toml.dumps(config))
    images = make_images(stand)
    request = await create(stand, await started(stand), block_mode(images))
    assert [wish.spec for wish in stand.devices.attached[1:]] == [
        BlockSpec(source=str(images.writable)),
        BlockSpec(source=str(images.middle), is_read_only=True),
        BlockSpec(source=str(images.lower), is_read_only=True),
    ]
    assert [storage.fstype for storage in request.storages] == ["ext4", "erofs", "erofs", "overlay"]
    assert request.oci is not None
    assert request.oci.root is not None
    assert request.oci.root.path == request.storages[-1].mount_point
    assert mounts.mounted_below(paths.layers_dir(stand.id)) == []
