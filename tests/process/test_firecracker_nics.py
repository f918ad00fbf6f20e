"""Network devices of Firecracker: real taps, which a fake opens by name in the network namespace of its jail."""

from __future__ import annotations

import asyncio
import shutil
import sys
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common import paths
from common.bus.client import BusClient
from common.errors import HypervisorError, KataError, NotFoundError, UnsupportedError, UsageError
from common.linux import cgroup, mounts
from common.services.vmm import BlockSpec, InterfaceKind, NetworkSpec
from common.testing.demands import How
from common.testing.device_stand import DeviceManager
from common.testing.fake_vmms import Firecracker, OlderFirecracker, trust_kvm
from common.testing.isolation import in_event_loop, run_dir
from common.testing.network_namespace import Namespace, namespace
from common.testing.vmm_stand import Manager, managing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.device import Device
    from common.services.vmm import Vm

PUT = "PUT /network-interfaces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """A jailed VM, its managers, and a network namespace that is a pod's."""

    sandbox_id: str
    manager: Manager
    devices: DeviceManager
    vm: Vm
    vmm: Firecracker
    pod: Namespace

    @property
    def jail(self) -> Namespace:
        """Where Firecracker is."""
        return Namespace(self.vm.process.pid)

    def tap(self, name: str = "tap0", **more: Any) -> NetworkSpec:  # noqa: ANN401 - fields of it
        return NetworkSpec(namespace=self.pod.path, interface=name, **more)

    async def attached(self, spec: NetworkSpec) -> Device:
        return await self.devices.confirm(await self.devices.attach(spec=spec))

    async def config(self) -> list[dict[str, Any]]:
        """Return what the fake says of its network devices."""
        nics: list[dict[str, Any]] = (await self.vmm.ask("config"))["network-interfaces"]
        return nics


@asynccontextmanager
async def jailed(kind: type[Firecracker], *, is_held: bool = False) -> AsyncIterator[Stand]:
    """Provide a jailed VM, and end all of it."""
    sandbox_id = f"f{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(run_dir())
        pod = stack.enter_context(namespace())
        trust_kvm(directory)
        Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
        jailer = directory / "jailer"
        jailer.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m common.testing.fake_firecracker.jailer "$@"\n')
        jailer.chmod(0o755)
        stack.callback(shutil.rmtree, paths.sandbox_dir(sandbox_id))
        stack.callback(mounts.unmount_below, paths.sandbox_dir(sandbox_id))
        stack.callback(cgroup.kill, sandbox_id)
        manager = await stack.enter_async_context(managing("firecracker"))
        create = manager.hold if is_held else manager.create
        program = kind.install(directory, *kind.arguments)
        vm = await create(sandbox_id, **{**kind.config, "path": program, "jailer_path": str(jailer)})
        vmm = kind()
        await vmm.connect(vm)
        stack.push_async_callback(vmm.close)
        bus = await stack.enter_async_context(BusClient())
        devices = DeviceManager(bus, sandbox_id, vm.hotplug_buses, hypervisor=vm.hypervisor, version=vm.version)
        stack.callback(devices.kill)
        await devices.start()
        yield Stand(sandbox_id=sandbox_id, manager=manager, devices=devices, vm=vm, vmm=vmm, pod=pod)


@in_event_loop
async def test_on_pci_the_same_tap_comes_with_its_device_and_goes_with_it() -> None:
    async with jailed(Firecracker) as stand:
        macs = set()
        for round_ in (1, 2):
            nic = await stand.attached(stand.tap())
            assert (nic.hypervisor_id, nic.guest_path, nic.is_guest_first) == (f"nic_{round_}", "03", True)
            assert (stand.pod.interfaces(), stand.jail.interfaces()) == ({"tap0"}, set())
            (told,) = await stand.config()
            assert isinstance(nic.spec, NetworkSpec)
            assert told["guest_mac"] == nic.spec.address(nic.serial)
            macs.add(told["guest_mac"])
            await stand.vmm.ask("rescan")
            await stand.vmm.ask("remove", slot=3)
            await stand.devices.detach(nic)
            assert (stand.pod.interfaces(), await stand.config()) == (set(), [])
        assert len(macs) == 2, "each attach has an address of its own"


@in_event_loop
async def test_disks_and_network_devices_share_the_slots() -> None:
    async with jailed(Firecracker) as stand:
        image = Path(paths.run_dir()) / "a"
        image.write_bytes(bytes(1 << 20))
        disk = await stand.devices.attach(spec=BlockSpec(source=str(image)))
        nic = await stand.attached(stand.tap(mac="02:00:00:00:00:07"))
        assert (disk.guest_path, nic.guest_path) == ("03", "04")
        assert (await stand.config())[0]["guest_mac"] == "02:00:00:00:00:07"
        assert (await stand.vmm.has())[0] == {"disk_1", "nic_2"}


@in_event_loop
async def test_without_pci_it_comes_before_the_boot_and_stays() -> None:
    async with jailed(OlderFirecracker, is_held=True) as stand:
        assert (await stand.manager.describe(stand.sandbox_id)).runstate == "not started"
        nic = await stand.attached(stand.tap())
        assert (nic.bus, nic.guest_path, nic.is_guest_first) == ("interfaces", "", False)
        assert (stand.pod.interfaces(), stand.jail.interfaces()) == ({"tap0"}, set())
        for _ in range(2):
            await stand.manager.resume(stand.sandbox_id)
        assert (await stand.manager.describe(stand.sandbox_id)).runstate == "running"
        root = stand.vmm.directory(stand.vm)
        assert {file.name for file in root.iterdir()}.isdisjoint({"kernel", "initrd"}), "they were read"
        with pytest.raises(UnsupportedError, match="only before the guest boots") as refused:
            await stand.devices.attach(spec=stand.tap("tap1"))
        assert "is_held" in str(refused.value.hint)
        with pytest.raises(UnsupportedError, match="without PCI Firecracker gives no network device up"):
            await stand.manager.remove(stand.sandbox_id, nic.hypervisor_id)
        assert stand.pod.interfaces() == {"tap0"}
        await stand.manager.destroy(stand.sandbox_id)
        assert stand.pod.interfaces() == set(), "it goes with the VM"


@in_event_loop
async def test_a_vm_on_pci_does_not_wait() -> None:
    with pytest.raises(UnsupportedError, match="on PCI does not wait with its boot"):
        async with jailed(Firecracker, is_held=True):
            pass


@in_event_loop
async def test_what_firecracker_cannot_have_is_refused_and_leaves_nothing() -> None:
    async with jailed(Firecracker) as stand:
        stand.pod.ip("tuntap", "add", "tap1", "mode", "tap")
        before = stand.pod.interfaces()
        refusals: list[tuple[NetworkSpec, type[KataError], str]] = [
            (stand.tap("mv0", type=InterfaceKind.MACVTAP), UnsupportedError, "a macvtap: it opens taps only"),
            (stand.tap("tap1"), UsageError, "tap1 is in .* already"),
            (NetworkSpec(namespace="/run/none", interface="tap2"), NotFoundError, "/run/none does not exist"),
        ]
        for spec, kind, said in refusals:
            with pytest.raises(kind, match=said):
                await stand.manager.plug(stand.sandbox_id, spec)
        assert (stand.pod.interfaces(), stand.jail.interfaces()) == (before, set())
        assert await stand.config() == []


@pytest.mark.parametrize("how", [How.REFUSED, How.ACTED_AND_REFUSED])
@in_event_loop
async def test_a_refused_one_is_undone_whole(how: How) -> None:
    async with jailed(Firecracker) as stand:
        await stand.vmm.misbehave(PUT, how)
        with pytest.raises(HypervisorError, match="demanded"):
            await stand.devices.attach(spec=stand.tap())
        assert (stand.pod.interfaces(), stand.jail.interfaces()) == (set(), set())
        assert await stand.config() == []
        assert (await stand.attached(stand.tap())).hypervisor_id == "nic_2", "no id is used twice"


@in_event_loop
async def test_what_a_manager_died_over_the_next_one_finishes() -> None:
    async with jailed(Firecracker) as stand:
        await stand.vmm.misbehave(PUT, How.LATE)
        call = asyncio.gather(stand.devices.attach(spec=stand.tap()), return_exceptions=True)
        while not await stand.config():  # noqa: ASYNC110 - another process's pace
            await asyncio.sleep(0.02)
        assert stand.pod.interfaces() == set(), "Firecracker has it open, and nobody has moved it"
        stand.manager.kill()
        await stand.manager.start()
        await call
        nic = await stand.devices.attach(spec=stand.tap())
        assert (stand.pod.interfaces(), stand.jail.interfaces()) == ({"tap0"}, set())
        assert (nic.hypervisor_id, len(await stand.config())) == ("nic_1", 1)
        await stand.devices.confirm(nic)
        stand.manager.kill()
        cgroup.kill(stand.sandbox_id)
        assert stand.pod.interfaces() == set(), "it goes with Firecracker, whoever else lives"
