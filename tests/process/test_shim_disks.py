"""A container's disks, as the shim handles them: plugged, told to the guest, confirmed; or aborted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import toml

from common import paths, status
from common.errors import GuestError, KataError
from common.linux import loop
from common.protocols import agent, oci, task
from common.protocols.agent import CreateContainerRequest
from common.services import device
from common.services.vmm import BlockSpec
from common.testing.fake_guest import Refusal
from common.testing.shim_client import started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_client import Shim
    from common.testing.shim_stand import ShimStand


async def create(stand: ShimStand, shim: Shim, image: str) -> None:
    request = stand.create_request("true")
    request.rootfs = [task.Mount(type="ext4", source=image, target="", options=["loop", "noatime"])]
    await stand.call(shim.client, "Create", request, task.PidResponse)


async def with_disks(stand: ShimStand) -> Shim:
    config = toml.loads(stand.config.read_text())
    config["hypervisor"]["qemu"]["disable_block_device_use"] = False
    stand.config.write_text(toml.dumps(config))
    return await started(stand)


def an_image(stand: ShimStand) -> str:
    path = stand.root / "image"
    path.touch()
    os.truncate(path, 1 << 20)
    return str(path)


@stand_test
async def test_the_guest_gets_the_disk_and_the_host_mounts_nothing(stand: ShimStand) -> None:
    shim, image = await with_disks(stand), an_image(stand)
    await create(stand, shim, image)
    assert stand.devices.calls == ["attach", "confirm", "attach", "confirm"], "the share, then the disk"
    wish = stand.devices.attached[-1]
    assert wish.spec == BlockSpec(source=image)
    assert wish.holder == stand.id
    assert stand.vms.guest is not None
    (request,) = [call for _, call in stand.vms.guest.calls if isinstance(call, CreateContainerRequest)]
    (storage,) = request.storages
    assert (storage.driver, storage.source, storage.fstype, storage.options) == ("blk", "02/00", "ext4", ["noatime"])
    assert storage.driver_options == ["serial=d2"]
    assert request.oci is not None
    assert request.oci.root is not None
    assert request.oci.root.path == storage.mount_point
    assert list(Path(paths.mounts_dir(stand.id), stand.id, "rootfs").iterdir()) == []


async def create_with(stand: ShimStand, shim: Shim, node: str) -> CreateContainerRequest:
    """Have a container created that is given a block device both as a mount and as a device node."""
    number = Path(node).stat().st_rdev
    numbers = {"type": "b", "major": os.major(number), "minor": os.minor(number)}
    linux = {
        "devices": [{"path": "/dev/data", **numbers}],
        "resources": {
            "devices": [{"allow": True, "access": "rwm", **numbers}],
            "blockIO": {"throttleReadBpsDevice": [{"major": numbers["major"], "minor": numbers["minor"], "rate": 5}]},
        },
    }
    mounted = {"type": "bind", "source": node, "destination": "/mnt/data", "options": ["bind"]}
    (stand.bundle / "config.json").write_text(json.dumps({**stand.spec(), "mounts": [mounted], "linux": linux}))
    await stand.call(shim.client, "Create", stand.create_request("true"), task.PidResponse)
    assert stand.vms.guest is not None
    (request,) = [call for _, call in stand.vms.guest.calls if isinstance(call, CreateContainerRequest)]
    return request


@stand_test
async def test_a_block_device_is_plugged_once_and_told_twice(stand: ShimStand) -> None:
    """Whatever the configuration says of root file systems: there is no other way to give it to the guest."""
    shim = await started(stand)
    with loop.device(an_image(stand), is_read_only=False) as node:
        request = await create_with(stand, shim, node)
        assert stand.devices.calls == ["attach", "confirm", "attach", "confirm"], "the share, then the disk"
        assert stand.devices.attached[-1].spec == BlockSpec(source=node)
    (storage,), (told,) = request.storages, request.devices
    assert (storage.driver, storage.source, storage.fstype) == ("blk", "02/00", "bind")
    assert (told.type, told.id, told.container_path, told.options) == ("blk", "02/00", "/dev/data", ["serial=d2"])
    assert request.oci is not None
    (mount,) = request.oci.mounts
    assert (mount.destination, mount.source) == ("/mnt/data", storage.mount_point)
    limits = limits_of(request)
    assert limits is not None
    assert [limit.rate for limit in limits.throttle_read_bps_device] == [5]


@stand_test
async def test_an_agent_that_would_limit_another_disk_is_told_no_limits(stand: ShimStand) -> None:
    """Upstream's."""
    stand.vms.features = []
    shim = await started(stand)
    with loop.device(an_image(stand), is_read_only=False) as node:
        assert limits_of(await create_with(stand, shim, node)) is None


def limits_of(request: CreateContainerRequest) -> oci.LinuxBlockIO | None:
    assert request.oci is not None
    assert request.oci.linux is not None
    assert request.oci.linux.resources is not None
    return request.oci.linux.resources.block_io


@stand_test
async def test_a_guest_that_cannot_use_the_disk_has_it_taken_away(stand: ShimStand) -> None:
    shim = await with_disks(stand)
    await stand.devices.has_confirmed.wait()
    assert stand.vms.guest is not None
    stand.vms.guest.refusals["CreateContainer"] = Refusal(status.UNAVAILABLE, "cannot mount ext4 '/dev/vda'")
    with pytest.raises(KataError, match="cannot mount ext4 '/dev/vda'"):
        await create(stand, shim, an_image(stand))
    assert stand.devices.calls == ["attach", "confirm", "attach", "abort"]


@stand_test
async def test_where_the_guest_goes_first_its_word_is_asked_for_and_handed_on(stand: ShimStand) -> None:
    assert await word_of_a_guest_that_cannot_use_the_disk(stand, [agent.RELEASE_DISKS_FEATURE], None) == (1, True)


@stand_test
async def test_where_the_guest_goes_first_and_keeps_a_disk_that_is_said(stand: ShimStand) -> None:
    in_use = Refusal(status.FAILED_PRECONDITION, "in use")
    assert await word_of_a_guest_that_cannot_use_the_disk(stand, [agent.RELEASE_DISKS_FEATURE], in_use) == (1, False)


@stand_test
async def test_an_agent_that_gives_no_word_is_not_asked(stand: ShimStand) -> None:
    """Upstream's."""
    assert await word_of_a_guest_that_cannot_use_the_disk(stand, [], None) == (0, False)


async def word_of_a_guest_that_cannot_use_the_disk(
    stand: ShimStand, features: list[str], refusal: Refusal | None
) -> tuple[int, bool]:
    """Return how often the agent was asked to let go of it, and what the device manager was told."""
    stand.devices.is_guest_first = True
    stand.vms.features = [agent.STREAM_PORTS_FEATURE, *features]
    shim = await with_disks(stand)
    await stand.devices.has_confirmed.wait()
    assert stand.vms.guest is not None
    stand.vms.guest.refusals["CreateContainer"] = Refusal(status.UNAVAILABLE, "no")
    if refusal:
        stand.vms.guest.refusals["ReleaseDisks"] = refusal
    with pytest.raises(KataError, match="no"):
        await create(stand, shim, an_image(stand))
    asked = [call for _, call in stand.vms.guest.calls if isinstance(call, agent.ReleaseDisksRequest)]
    for disk in (disk for request in asked for disk in request.disks):
        assert (disk.driver, disk.source, disk.driver_options) == ("blk", "02/00", ["serial=d2"])
    (wish,) = stand.devices.aborted
    assert (wish.device_id, wish.holder) == ("d2", stand.id)
    return len(asked), wish.is_let_go


@stand_test
async def test_a_disk_that_cannot_be_plugged_is_said(stand: ShimStand) -> None:
    shim = await with_disks(stand)
    await stand.devices.has_confirmed.wait()
    stand.devices.error = GuestError("the bus is full")
    with pytest.raises(KataError, match="the bus is full"):
        await create(stand, shim, an_image(stand))
    assert stand.devices.calls == ["attach", "confirm", "attach"]


@stand_test
async def test_a_disk_that_vanishes_is_said_in_the_log(stand: ShimStand) -> None:
    shim, image = await with_disks(stand), an_image(stand)
    await create(stand, shim, image)
    await stand.devices.publisher.publish(device.DEVICE_LOST, device_of_another(stand), audience=stand.id)
    disk = stand.devices.present.pop()
    await stand.devices.publisher.publish(device.DEVICE_LOST, disk, audience=stand.id)
    record = await stand.logged("device lost: I/O on it fails")
    assert (record["level"], record["device"], record["source"]) == ("error", "d2", image)
    assert record["containers"] == [stand.id]


@stand_test
async def test_a_disk_that_vanished_unheard_is_said_when_the_device_manager_is_back(stand: ShimStand) -> None:
    shim, image = await with_disks(stand), an_image(stand)
    await create(stand, shim, image)
    await stand.devices.publisher.publish(device.DEVICE_LOST, device_of_another(stand), audience=stand.id)
    del stand.devices.present[1]
    await stand.restart_publisher()
    assert (await stand.logged("device lost: I/O on it fails"))["device"] == "d2"


def device_of_another(stand: ShimStand) -> device.Device:
    return msgspec.structs.replace(stand.devices.present[0], device_id="other", sandbox_id="other")
