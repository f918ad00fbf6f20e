"""Devices of the host that a container is given, as the shim handles them: plugged, told, confirmed; or aborted."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import toml

from common import status
from common.config import QemuConfig
from common.errors import KataError, StateError
from common.protocols import agent, task
from common.protocols.agent import CreateContainerRequest
from common.services.vmm import VfioSpec
from common.testing.fake_guest import Refusal
from common.testing.host_devices import GPU, NUMBER, SOUND, VFIO_NUMBER, a_host_with_devices
from common.testing.shim_client import started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.shim_stand import ShimStand


@contextmanager
def given(stand: ShimStand, **section: object) -> Iterator[None]:
    """Have the container given a group of a host that has it, as ``--device /dev/vfio/12`` does."""
    nodes = [
        {"path": path, "type": "c", "major": number[0], "minor": number[1]}
        for path, number in (("/dev/vfio/12", NUMBER), ("/dev/vfio/vfio", VFIO_NUMBER))
    ]
    rules = [{"allow": True, "access": "rwm", **node} for node in nodes]
    linux = {"devices": nodes, "resources": {"devices": rules}}
    (stand.bundle / "config.json").write_text(json.dumps({**stand.spec(), "linux": linux}))
    config = toml.loads(stand.config.read_text())
    config["hypervisor"]["qemu"].update(section)
    stand.config.write_text(toml.dumps(config))
    with a_host_with_devices(stand.root / "sys"):
        yield


async def create(stand: ShimStand) -> None:
    shim = await started(stand)
    await stand.devices.has_confirmed.wait()
    await stand.call(shim.client, "Create", stand.create_request("true"), task.PidResponse)


def told(stand: ShimStand) -> CreateContainerRequest:
    assert stand.vms.guest is not None
    (request,) = [call for _, call in stand.vms.guest.calls if isinstance(call, CreateContainerRequest)]
    return request


@stand_test
async def test_the_guest_gets_each_device_of_the_group_and_no_node(stand: ShimStand) -> None:
    with given(stand, hot_plug_vfio="bridge-port"):
        await create(stand)
        assert stand.devices.calls == ["attach", "confirm", "attach", "attach", "confirm", "confirm"], "share first"
        wishes = stand.devices.attached[1:]
        assert [wish.spec for wish in wishes] == [VfioSpec(source=address) for address in (GPU, SOUND)]
        assert {wish.holder for wish in wishes} == {stand.id}
        request = told(stand)
        (device,) = request.devices
        assert (device.type, device.id, device.container_path) == (agent.GUEST_DRIVEN, "12", "/dev/vfio/12")
        assert device.options == [f"{GPU}=02/00", f"{SOUND}=02/00"], "the fake has but one place"
        assert request.oci is not None
        assert request.oci.linux is not None
        assert request.oci.linux.devices == []
        assert request.oci.linux.resources is not None
        assert request.oci.linux.resources.devices == []


@stand_test
async def test_root_ports_are_asked_for_if_the_configuration_says_so(stand: ShimStand) -> None:
    with given(stand, hot_plug_vfio="root-port", pcie_root_port=2):
        await create(stand)
        wanted = [VfioSpec(source=address, is_express=True) for address in (GPU, SOUND)]
        assert [wish.spec for wish in stand.devices.attached[1:]] == wanted


@stand_test
async def test_a_configuration_that_gives_guests_none_is_said_with_a_remedy(stand: ShimStand) -> None:
    with given(stand), pytest.raises(KataError) as refused:
        await create(stand)
    assert "device /dev/vfio/12 of the host is asked for, and the configuration gives guests none" in str(refused.value)
    assert "hot_plug_vfio" in str(refused.value)
    assert stand.devices.calls == ["attach", "confirm"], "the share"


@stand_test
async def test_a_guest_that_does_not_find_them_has_them_taken_away(stand: ShimStand) -> None:
    with given(stand, hot_plug_vfio="bridge-port"):
        shim = await started(stand)
        await stand.devices.has_confirmed.wait()
        assert stand.vms.guest is not None
        stand.vms.guest.refusals["CreateContainer"] = Refusal(status.UNAVAILABLE, "no device of the host appeared")
        with pytest.raises(KataError, match="no device of the host appeared"):
            await stand.call(shim.client, "Create", stand.create_request("true"), task.PidResponse)
        assert [wish.device_id for wish in stand.devices.aborted] == ["d3", "d2"]


@stand_test
async def test_a_guest_that_is_to_boot_with_them_does_not_boot_before(stand: ShimStand) -> None:
    with given(stand, cold_plug_vfio="root-port"):
        shim = await started(stand)
        await stand.devices.has_confirmed.wait()
        wanted = [VfioSpec(source=address, is_express=True) for address in (GPU, SOUND)]
        assert [wish.spec for wish in stand.devices.attached[:2]] == wanted
        assert {wish.holder for wish in stand.devices.attached[:2]} == {stand.id}
        assert stand.devices.calls == ["attach", "attach", "attach", "confirm"], "the share comes last"
        assert stand.vms.calls == ["create_vm", "resume_vm"]
        assert stand.vms.wish.is_held
        assert isinstance(stand.vms.wish.config, QemuConfig)
        assert stand.vms.wish.config.pcie_root_port == 2
        await stand.call(shim.client, "Create", stand.create_request("true"), task.PidResponse)
        assert [wish.spec for wish in stand.devices.attached[3:]] == wanted, "asked for again, and confirmed then"
        assert stand.devices.calls[4:] == ["attach", "attach", "confirm", "confirm"]
        assert told(stand).devices[0].type == agent.GUEST_DRIVEN


@stand_test
async def test_without_such_devices_the_guest_boots_at_once(stand: ShimStand) -> None:
    with given(stand, cold_plug_vfio="root-port"):
        (stand.bundle / "config.json").write_text(json.dumps(stand.spec()))
        await create(stand)
        assert stand.vms.calls[0] == "create_vm"
        assert "resume_vm" not in stand.vms.calls
        assert not stand.vms.wish.is_held


@stand_test
async def test_a_device_that_the_guest_cannot_boot_with_is_said_at_create(stand: ShimStand) -> None:
    with given(stand, cold_plug_vfio="root-port"):
        stand.devices.error = StateError("PCI device 0000:3b:00.0 is driven by nvidia")
        shim = await started(stand)
        with pytest.raises(KataError, match=r"failed while plugging devices of the host: .* is driven by nvidia"):
            await stand.call(shim.client, "Create", stand.create_request("true"), task.PidResponse)
        assert "resume_vm" not in stand.vms.calls
