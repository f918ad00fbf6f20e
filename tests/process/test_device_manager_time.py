"""What the device manager does when time runs out, in this process, with short times."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from common.bus.client import BusClient
from common.bus.events import Publisher
from common.errors import HypervisorError, StateError
from common.services.device import SERVICE, Attach, Device, DeviceRef, ListDevices
from common.testing.device_stand import BUSES, SANDBOX, FakeVmManager, share
from common.testing.isolation import in_event_loop, run_dir
from common.workers import Workers
from procs.device_manager.claims import Claims
from procs.device_manager.journal import Journal
from procs.device_manager.lives import Lives
from procs.device_manager.measures import Measures
from procs.device_manager.news import News
from procs.device_manager.rules import RULES, Rule
from procs.device_manager.service import DeviceService
from procs.device_manager.table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

SHORT_S = 0.05


@dataclass
class Manager:
    """A device manager in this process, and its VM manager."""

    service: DeviceService
    vms: FakeVmManager

    async def attach(self, holder: str = "") -> Device:
        wish = Attach(
            sandbox_id=SANDBOX,
            hypervisor="qemu",
            version="7.2.22",
            buses=BUSES,
            spec=share("a"),
            holder=holder,
            lease_s=SHORT_S,
        )
        return await self.service.attach(wish)

    async def devices(self) -> tuple[Device, ...]:
        return (await self.service.list_devices(ListDevices())).devices

    async def wait_empty(self) -> None:
        while await self.devices():  # noqa: ASYNC110 - the manager tells nobody
            await asyncio.sleep(SHORT_S)


@asynccontextmanager
async def managing(known: Iterable[Rule] = RULES) -> AsyncIterator[Manager]:
    """Provide a device manager that hears its VM manager, and that VM manager."""
    vms = FakeVmManager()
    with run_dir(), Journal() as journal, Claims() as claims:
        await vms.start()
        async with BusClient() as bus, Publisher(SERVICE) as publisher, Workers() as workers:
            lives = Lives(Table(journal, claims), bus, publisher, workers, removal_timeout_s=SHORT_S, rules=known)
            workers.spawn(News(SERVICE, lives, bus, workers).follow(("qemu",)))
            await vms.is_compared.wait()
            yield Manager(DeviceService(lives, journal, Measures(lives), ("qemu",)), vms)
        await vms.stop()


@in_event_loop
async def test_a_lease_that_runs_out_undoes_the_attach() -> None:
    async with managing() as manager:
        await manager.attach()
        await manager.wait_empty()
        assert manager.vms.present == {}
        assert manager.vms.removals == ["share-1"]


@in_event_loop
async def test_a_confirmed_device_outlives_its_lease_and_a_holder_that_did_not_confirm() -> None:
    async with managing() as manager:
        attached = await manager.attach("c1")
        await manager.service.confirm(DeviceRef(device_id=attached.device_id, holder="c1"))
        assert len((await manager.attach("c2")).holders) == 2
        while [holder.name for holder in (await manager.devices())[0].holders] != ["c1"]:  # noqa: ASYNC110
            await asyncio.sleep(SHORT_S)
        assert manager.vms.removals == []


@in_event_loop
async def test_a_refused_removal_is_quarantined_and_callers_cannot_ask_again() -> None:
    async with managing() as manager:
        attached = await manager.attach()
        reference = DeviceRef(device_id=attached.device_id)
        await manager.service.confirm(reference)
        manager.vms.removal_error = HypervisorError("no")
        with pytest.raises(HypervisorError, match="quarantined and keeps slot 0 of port0"):
            await manager.service.detach(reference)
        with pytest.raises(StateError, match="is quarantined and cannot be asked to detach"):
            await manager.service.detach(reference)
        await manager.vms.confirm_removal("share-1")
        await manager.wait_empty()


@in_event_loop
async def test_a_quarantined_device_is_asked_for_again_by_its_hypervisors_rule() -> None:
    often = Rule(hypervisor="qemu", kinds=frozenset({"share"}), again_after_s=(SHORT_S, SHORT_S))
    async with managing([often]) as manager:
        manager.vms.lets_go = False
        attached = await manager.attach()
        with pytest.raises(HypervisorError, match="quarantined"):
            await manager.service.detach(DeviceRef(device_id=attached.device_id))
        while manager.vms.removals != ["share-1"] * 3:  # noqa: ASYNC110 - the manager tells nobody
            await asyncio.sleep(SHORT_S)
        await manager.vms.confirm_removal("share-1")
        await manager.wait_empty()
