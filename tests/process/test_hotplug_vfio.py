"""Devices of the host, from the caller to a fake hypervisor, on a host that is a directory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import AlreadyExistsError, HypervisorError, StateError, UnsupportedError
from common.services.vmm import VfioSpec
from common.testing.demands import How
from common.testing.fake_vmms import FAKES, Qemu
from common.testing.host_devices import DISK, GPU, SOUND, a_host_with_devices
from common.testing.hotplug_stand import plugging, plugging_into
from common.testing.isolation import in_event_loop
from procs.device_manager.commands import CALL_TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path

    from common.services.device import Device
    from common.testing.hotplug_stand import HotplugStand

on_both = pytest.mark.parametrize("hypervisor", ["qemu", "clh"])
ADDS = {"qemu": "device_add", "clh": "vm.add-device"}


class WithRootPort(Qemu):
    """A fake QEMU with a root port."""

    config = {**Qemu.config, "pcie_root_port": 1}  # noqa: RUF012 - it is a class variable there


async def given(stand: HotplugStand[Any], address: str, *, is_express: bool = False) -> Device:
    spec = VfioSpec(source=address, is_express=is_express)
    return await stand.devices.confirm(await stand.devices.attach(spec=spec))


@on_both
@in_event_loop
async def test_a_group_comes_device_by_device_and_goes_again(hypervisor: str, tmp_path: Path) -> None:
    with a_host_with_devices(tmp_path):
        async with plugging(hypervisor) as stand:
            for _ in range(2):
                gpu, sound = [await given(stand, address) for address in (GPU, SOUND)]
                assert (await stand.vmm.has())[0] == {gpu.hypervisor_id, sound.hypervisor_id}
                assert gpu.guest_path
                assert gpu.guest_path != sound.guest_path
                for device in (gpu, sound):
                    await stand.devices.detach(device)
                assert await stand.vmm.has() == (set(), set())


@pytest.mark.soak
@on_both
@in_event_loop
async def test_it_may_take_longer_than_other_devices(hypervisor: str, tmp_path: Path) -> None:
    """All of the guest's memory is pinned first; who waits for the answer has more patience than for a disk's."""
    with a_host_with_devices(tmp_path):
        async with plugging(hypervisor) as stand:
            await stand.vmm.misbehave(ADDS[hypervisor], How.LATE)
            attaching = asyncio.gather(stand.devices.attach(spec=VfioSpec(source=GPU)))
            await asyncio.sleep(CALL_TIMEOUT_S + 2)
            await stand.vmm.ask("x-release" if hypervisor == "qemu" else "release")
            (gpu,) = await attaching
            assert (await stand.vmm.has())[0] == {gpu.hypervisor_id}


@on_both
@in_event_loop
async def test_a_guest_that_keeps_a_device_keeps_it_from_all_others(hypervisor: str, tmp_path: Path) -> None:
    with a_host_with_devices(tmp_path):
        async with plugging(hypervisor) as stand:
            gpu = await given(stand, GPU)
            await stand.vmm.guest_lets_go(does=False)
            with pytest.raises(HypervisorError, match="quarantined"):
                await stand.devices.detach(gpu)
            with pytest.raises(AlreadyExistsError, match=f"{GPU} is held by device .*, which is quarantined"):
                await stand.devices.attach(spec=VfioSpec(source=GPU))
            await stand.vmm.let_go(gpu.hypervisor_id)
            await stand.devices.wait_devices({})


@on_both
@in_event_loop
async def test_what_the_host_uses_is_refused_before_the_hypervisor_is_asked(hypervisor: str, tmp_path: Path) -> None:
    with a_host_with_devices(tmp_path) as host:
        async with plugging(hypervisor) as stand:
            before = len(await stand.vmm.transcript())
            with pytest.raises(StateError, match=r"0000:01:00\.0 is driven by nvme"):
                await stand.devices.attach(spec=VfioSpec(source=DISK))
            host.bind(SOUND, "snd_hda_intel")
            with pytest.raises(StateError, match="is driven by snd_hda_intel and not by vfio-pci"):
                await stand.devices.attach(spec=VfioSpec(source=GPU))
            assert len(await stand.vmm.transcript()) == before


@in_event_loop
async def test_behind_a_root_port_or_not_at_all(tmp_path: Path) -> None:
    with a_host_with_devices(tmp_path):
        async with plugging_into(WithRootPort) as stand:
            gpu = await given(stand, GPU, is_express=True)
            assert (gpu.bus, gpu.guest_path) == ("port0", "09/00")
            assert (await stand.devices.attach(spec=stand.disk("a"))).bus == "bridge0", "virtio needs none"
        async with plugging_into(FAKES["qemu"]) as stand:
            with pytest.raises(UnsupportedError, match="has no hotplug bus for pcie devices"):
                await given(stand, GPU, is_express=True)
