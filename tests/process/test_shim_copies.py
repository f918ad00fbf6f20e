"""A container under a hypervisor that shares no directories: its root is a disk, all else of the host are copies."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import toml

from common.config import BlockDriver
from common.errors import KataError
from common.linux import loop
from common.protocols import task
from common.protocols.agent import SHARE_MOUNT_POINT, CreateContainerRequest, CreateSandboxRequest
from common.protocols.guest import CopyFileRequest
from common.services.vmm import BlockSpec
from common.testing.shim_client import started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_client import Shim
    from common.testing.shim_stand import ShimStand


async def without_share(stand: ShimStand) -> Shim:
    program = stand.root / "firecracker"
    program.touch()
    section = {"path": str(program), "jailer_path": "", "kernel": "/bin/true", "initrd": "/bin/true"}
    stand.config.write_text(toml.dumps({"hypervisor": {"firecracker": section}}))
    return await started(stand)


def bind(source: Path, target: str, *options: str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": target, "options": ["rbind", *options]}


async def create(stand: ShimStand, shim: Shim, *mounts: dict[str, Any], is_on_disk: bool = True) -> None:
    request = stand.create_request("true")
    spec = stand.spec()
    (stand.bundle / "config.json").write_text(json.dumps({**spec, "mounts": [*spec.get("mounts", []), *mounts]}))
    if is_on_disk:
        image = stand.root / "image"
        image.write_bytes(bytes(1 << 20))
        request.rootfs = [task.Mount(type="ext4", source=str(image), target="", options=["loop"])]
    await stand.call(shim.client, "Create", request, task.PidResponse)


def asked(stand: ShimStand, kind: type[Any]) -> list[Any]:
    assert stand.vms.guest is not None
    return [call for _, call in stand.vms.guest.calls if isinstance(call, kind)]


@stand_test
async def test_the_root_is_a_disk_and_files_are_copied_before_the_container_is_made(stand: ShimStand) -> None:
    shim = await without_share(stand)
    hosts, secrets = stand.root / "hosts", stand.root / "secrets"
    hosts.write_text("127.0.0.1 localhost\n")
    hosts.chmod(0o640)
    secrets.mkdir()
    (secrets / "..data").mkdir()
    (secrets / "..data" / "token").write_text("x")
    (secrets / "token").symlink_to("..data/token")
    await create(stand, shim, bind(hosts, "/etc/hosts"), bind(secrets, "/secrets", "ro"))
    assert stand.devices.calls == ["attach", "confirm"], "no share, only the disk"
    assert stand.devices.attached[0].spec == BlockSpec(source=str(stand.root / "image"), driver=BlockDriver.VIRTIO_MMIO)
    (sandbox,) = asked(stand, CreateSandboxRequest)
    assert sandbox.storages == []
    copies = {copy.path: copy for copy in asked(stand, CopyFileRequest)}
    place = f"{SHARE_MOUNT_POINT}/{stand.id}/mounts"
    assert list(copies) == [
        f"{place}/0",
        f"{place}/1",
        f"{place}/1/..data",
        f"{place}/1/..data/token",
        f"{place}/1/token",
    ]
    assert copies[f"{place}/0"].data == b"127.0.0.1 localhost\n"
    assert copies[f"{place}/0"].file_mode == stat.S_IFREG | 0o640
    assert copies[f"{place}/1/token"].data == b"..data/token"
    (container,) = asked(stand, CreateContainerRequest)
    assert {mount.source for mount in container.oci.mounts} == {f"{place}/0", f"{place}/1"}
    (storage,) = container.storages
    assert storage.driver == "mmioblk"


@stand_test
async def test_a_root_that_is_a_directory_is_refused_with_a_way_out(stand: ShimStand) -> None:
    shim = await without_share(stand)
    with pytest.raises(KataError, match=r"which firecracker cannot share .*devmapper, blockfile"):
        await create(stand, shim, is_on_disk=False)
    assert stand.devices.calls == []


@stand_test
async def test_a_directory_that_the_container_may_write_to_is_refused(stand: ShimStand) -> None:
    shim = await without_share(stand)
    volume = stand.root / "volume"
    volume.mkdir()
    with pytest.raises(KataError, match=r"volume is a directory that the container may write to.*mount it read-only"):
        await create(stand, shim, bind(volume, "/volume"))
    assert asked(stand, CopyFileRequest) == []


@stand_test
async def test_what_is_too_large_to_be_the_guests_memory_is_refused(stand: ShimStand) -> None:
    shim = await without_share(stand)
    large = stand.root / "large"
    large.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(KataError, match="large is too large to be copied into the guest: at most 1048576 bytes"):
        await create(stand, shim, bind(large, "/large"))


@stand_test
async def test_a_large_file_comes_in_pieces(stand: ShimStand) -> None:
    shim = await without_share(stand)
    file = stand.root / "file"
    file.write_bytes(bytes(range(256)) * (3 << 10))
    await create(stand, shim, bind(file, "/file"))
    pieces = asked(stand, CopyFileRequest)
    assert [piece.offset for piece in pieces] == [0, 512 << 10]
    assert b"".join(piece.data for piece in pieces) == file.read_bytes()
    assert {piece.file_size for piece in pieces} == {file.stat().st_size}


@stand_test
async def test_a_block_device_is_a_disk_and_no_copy(stand: ShimStand) -> None:
    shim = await without_share(stand)
    data = stand.root / "data"
    data.write_bytes(bytes(1 << 20))
    with loop.device(str(data), is_read_only=False) as node:
        await create(stand, shim, bind(Path(node), "/mnt/data", "ro"))
    driver = BlockDriver.VIRTIO_MMIO
    assert stand.devices.attached[-1].spec == BlockSpec(source=node, is_read_only=True, driver=driver)
    assert asked(stand, CopyFileRequest) == []
    (request,) = asked(stand, CreateContainerRequest)
    assert [storage.fstype for storage in request.storages] == ["ext4", "bind"]
