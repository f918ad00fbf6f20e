"""Network devices of Cloud Hypervisor: real interfaces, whose descriptors a fake is handed."""

from __future__ import annotations

import pytest

from common import shards
from common.bus.events import Subscriber
from common.errors import HypervisorError, KataError, NotFoundError, UsageError
from common.services.vmm import InterfaceKind, NetworkSpec
from common.testing.demands import How
from common.testing.hotplug_stand import plugging
from common.testing.isolation import in_event_loop
from common.testing.network_namespace import namespace
from common.testing.vmm_stand import removed


@in_event_loop
async def test_the_same_tap_comes_with_its_device_and_goes_with_it() -> None:
    with namespace() as pod:
        async with plugging("clh") as stand:
            macs = set()
            for _ in range(3):
                nic = await stand.devices.attach(spec=NetworkSpec(namespace=pod.path, interface="tap0"))
                assert isinstance(nic.spec, NetworkSpec)
                macs.add(nic.spec.address(nic.serial))
                assert pod.interfaces() == {"tap0"}
                assert (await stand.vmm.has())[0] == {nic.hypervisor_id}
                await stand.devices.detach(await stand.devices.confirm(nic))
                assert pod.interfaces() == set(), "it is told gone when the interface is free, not before"
            assert len(macs) == 3, "each attach has an address of its own"


@in_event_loop
async def test_a_tap_that_was_there_stays_and_so_does_a_macvtap() -> None:
    with namespace() as pod:
        pod.ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
        mac = pod.add_macvtap("mv0")
        before = pod.interfaces()
        async with plugging("clh") as stand:
            tap = NetworkSpec(namespace=pod.path, interface="tap0")
            macvtap = NetworkSpec(namespace=pod.path, interface="mv0", type=InterfaceKind.MACVTAP, mac=mac)
            nics = [await stand.devices.confirm(await stand.devices.attach(spec=spec)) for spec in (tap, macvtap)]
            with pytest.raises(UsageError, match="busy"):
                await stand.manager.plug(stand.sandbox_id, tap, slot=5)
            for nic in nics:
                await stand.devices.detach(nic)
        assert pod.interfaces() == before


@in_event_loop
async def test_a_refused_interface_leaves_nothing() -> None:
    with namespace() as pod:
        async with plugging("clh") as stand:
            macvtap = InterfaceKind.MACVTAP
            refusals: list[tuple[NetworkSpec, type[KataError], str]] = [
                (NetworkSpec(namespace="/run/none", interface="tap1"), NotFoundError, "/run/none does not exist"),
                (NetworkSpec(namespace=pod.path, interface="mv9", type=macvtap), UsageError, "no interface with"),
            ]
            for spec, kind, said in refusals:
                with pytest.raises(kind, match=said):
                    await stand.manager.plug(stand.sandbox_id, spec)
            await stand.vmm.misbehave("vm.add-net", How.REFUSED)
            with pytest.raises(HypervisorError, match="demanded"):
                await stand.manager.plug(stand.sandbox_id, NetworkSpec(namespace=pod.path, interface="tap0"))
            assert (pod.interfaces(), await stand.vmm.has()) == (set(), (set(), set()))
            assert await stand.manager.list(stand.sandbox_id) == ()


@in_event_loop
async def test_an_add_that_is_never_answered_is_found_by_its_address() -> None:
    with namespace() as pod:
        mac = "02:AB:00:00:00:01"
        async with plugging("clh") as stand:
            specs = [NetworkSpec(namespace=pod.path, interface=name, mac=mac) for name in ("tap0", "tap1")]
            first = await stand.manager.plug(stand.sandbox_id, specs[0], slot=0)
            await stand.vmm.misbehave("vm.add-net", How.NEVER)
            second = await stand.manager.plug(stand.sandbox_id, specs[1], slot=1)
            assert (await stand.vmm.has())[0] == {first.hypervisor_id, second.hypervisor_id}
            assert first.guest_path != second.guest_path


@pytest.mark.parametrize("version", ["51.1.0", "52.0.0", "53.0.0"])
@in_event_loop
async def test_a_second_removal_is_not_asked_of_a_version_that_panics(version: str) -> None:
    with namespace() as pod:
        async with plugging("clh", "--as", version) as stand, Subscriber({stand.manager.service: shards.FIRST}) as news:
            nic = await stand.manager.plug(stand.sandbox_id, NetworkSpec(namespace=pod.path, interface="tap0"))
            await stand.vmm.guest_lets_go(does=False)
            for _ in range(2):
                await stand.manager.remove(stand.sandbox_id, nic.hypervisor_id)
            assert (await stand.manager.describe(stand.sandbox_id)).is_running
            await stand.vmm.guest_lets_go(does=True)
            assert await removed(news) == nic.hypervisor_id
            assert pod.interfaces() == set()
