"""Network devices of a real QEMU: plugged, refused, unplugged; what is left on the host is nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common import shards
from common.bus.events import Subscriber
from common.errors import KataError, NotFoundError, UsageError
from common.services.vmm import InterfaceKind, NetworkSpec
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import hotplugging
from common.testing.network_namespace import namespace
from common.testing.vmm_stand import SERVICE, Monitor, booted, managing, removed

if TYPE_CHECKING:
    from common.services import vmm
    from common.testing.vmm_stand import Manager


async def seen(manager: Manager, vm: vmm.Vm) -> tuple[set[str], set[str]]:
    """Return the network devices that QEMU has, and their ends on the host, once the manager agrees."""
    async with Monitor(vm) as monitor:
        plugged, ends = await monitor.plugged(), await monitor.network_ends()
    assert set(await manager.present(vm.sandbox_id)) == plugged | ends
    return plugged, ends


@in_event_loop
async def test_a_tap_comes_with_its_device_and_goes_with_it(sandbox: str) -> None:
    with namespace() as pod:
        async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
            vm = await manager.create(sandbox)
            await booted(vm)
            spec = NetworkSpec(namespace=pod.path, interface="tap0")
            for number in range(1, 4):  # the same interface again and again, at once
                nic = await manager.plug(sandbox, spec, number % 2)
                assert (nic.hypervisor_id, pod.interfaces()) == (f"nic-{number}", {"tap0"})
                assert await seen(manager, vm) == ({nic.hypervisor_id}, {nic.hypervisor_id})
                await manager.remove(sandbox, nic.hypervisor_id)
                assert await removed(news) == nic.hypervisor_id
                assert pod.interfaces() == set(), "it is told when the interface is free, not before"
                assert await seen(manager, vm) == (set(), set())
            await manager.destroy(sandbox)


@in_event_loop
async def test_a_tap_that_was_there_stays_and_so_does_a_macvtap(sandbox: str) -> None:
    with namespace() as pod:
        pod.ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
        mac = pod.add_macvtap("mv0")
        before = pod.interfaces()
        async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
            vm = await manager.create(sandbox)
            await booted(vm)
            tap = await manager.plug(sandbox, NetworkSpec(namespace=pod.path, interface="tap0"), 0)
            spec = NetworkSpec(namespace=pod.path, interface="mv0", type=InterfaceKind.MACVTAP, mac=mac)
            macvtap = await manager.plug(sandbox, spec, 1)
            async with Monitor(vm) as monitor:
                assert mac in (await monitor.macs()).values()
            for nic in (tap, macvtap):
                await manager.remove(sandbox, nic.hypervisor_id)
                assert await removed(news) == nic.hypervisor_id
            await manager.destroy(sandbox)
        assert pod.interfaces() == before


@in_event_loop
async def test_a_refused_interface_leaves_nothing(sandbox: str) -> None:
    with namespace() as pod:
        async with managing() as manager:
            vm = await manager.create(sandbox)
            pod.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
            held = await manager.plug(sandbox, NetworkSpec(namespace=pod.path, interface="tap0"), 0)
            macvtap = InterfaceKind.MACVTAP
            refusals: list[tuple[NetworkSpec, type[KataError], str]] = [
                (NetworkSpec(namespace="/run/none", interface="tap1"), NotFoundError, "/run/none does not exist"),
                (NetworkSpec(namespace=pod.path, interface="tap0"), UsageError, "busy"),
                (NetworkSpec(namespace=pod.path, interface="v0"), UsageError, "v0 in .* opened as a tap: Invalid"),
                (NetworkSpec(namespace=pod.path, interface="v0", type=macvtap), UsageError, "v0 is no macvtap"),
                (NetworkSpec(namespace=pod.path, interface="mv9", type=macvtap), UsageError, "no interface with"),
            ]
            for spec, kind, said in refusals:
                with pytest.raises(kind, match=said):
                    await manager.plug(sandbox, spec, 1)
                assert await seen(manager, vm) == ({held.hypervisor_id}, {held.hypervisor_id})
                assert pod.interfaces() == {"v0", "v1", "tap0"}
            await manager.destroy(sandbox)
        assert pod.interfaces() == {"v0", "v1"}


@in_event_loop
async def test_what_a_dead_manager_left_half_done_is_undone(sandbox: str) -> None:
    with namespace() as pod:
        async with managing() as manager:
            vm = await manager.create(sandbox)
            await booted(vm)
            nic = await manager.plug(sandbox, NetworkSpec(namespace=pod.path, interface="tap0"), 0)
            manager.kill()
            async with Monitor(vm) as monitor:
                await monitor.unplug(nic.hypervisor_id)
            assert pod.interfaces() == {"tap0"}, "QEMU keeps it open"
            await manager.start()
            assert await seen(manager, vm) == (set(), set())
            assert pod.interfaces() == set()
            await manager.destroy(sandbox)


@in_event_loop
async def test_each_attach_has_a_mac_of_its_own_and_the_device_manager_waits_for_its_end(sandbox: str) -> None:
    with namespace() as pod:
        async with hotplugging(sandbox) as stand:
            macs = set()
            for _ in range(3):
                nic = await stand.devices.attach(spec=NetworkSpec(namespace=pod.path, interface="tap0"))
                assert isinstance(nic.spec, NetworkSpec)
                async with Monitor(stand.vm) as monitor:
                    assert await monitor.macs() == {nic.hypervisor_id: nic.spec.address(nic.serial)}
                macs.add(nic.spec.address(nic.serial))
                await stand.devices.confirm(nic)
                await stand.devices.detach(nic)
                assert (pod.interfaces(), await stand.devices.list()) == (set(), ())
            assert len(macs) == 3
