"""What the device manager does when time runs out, in this process, with short times."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from common.bus.client import BusClient
from common.errors import HypervisorError, StateError
from common.services import vmm
from common.services.device import Attach, DeviceRef, ListDevices
from common.testing.device_stand import BUSES, SANDBOX, FakeVmManager
from common.testing.isolation import in_event_loop, run_dir
from common.workers import Workers
from procs.device_manager.journal import Journal
from procs.device_manager.manager import DeviceManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SHORT_S = 0.05
WISH = Attach(sandbox_id=SANDBOX, hypervisor="qemu", buses=BUSES, spec=vmm.ShareSpec(source="/x", tag="t"))


@asynccontextmanager
async def managing() -> AsyncIterator[tuple[DeviceManager, FakeVmManager]]:
    """Provide a device manager that hears its VM manager, and that VM manager."""
    vms = FakeVmManager()
    with run_dir(), Journal() as journal:
        await vms.start()
        async with BusClient() as bus, Workers() as workers:
            manager = DeviceManager(journal, bus, workers, lease_s=SHORT_S, removal_timeout_s=SHORT_S)
            workers.spawn(manager.follow(("qemu",)))
            await vms.is_compared.wait()
            yield manager, vms
        await vms.stop()


async def wait_empty(manager: DeviceManager) -> None:
    while (await manager.list_devices(ListDevices())).devices:  # noqa: ASYNC110 - the manager tells nobody
        await asyncio.sleep(SHORT_S)


@in_event_loop
async def test_a_lease_that_runs_out_undoes_the_attach() -> None:
    async with managing() as (manager, vms):
        await manager.attach(WISH)
        await wait_empty(manager)
        assert vms.present == {}
        assert vms.removals == ["share-1"]


@in_event_loop
async def test_a_confirmed_device_outlives_its_lease() -> None:
    async with managing() as (manager, vms):
        attached = await manager.attach(WISH)
        await manager.confirm(DeviceRef(device_id=attached.device_id))
        await asyncio.sleep(3 * SHORT_S)
        assert vms.removals == []


@in_event_loop
async def test_a_refused_removal_is_quarantined_and_not_asked_again() -> None:
    async with managing() as (manager, vms):
        attached = await manager.attach(WISH)
        reference = DeviceRef(device_id=attached.device_id)
        await manager.confirm(reference)
        vms.removal_error = HypervisorError("no")
        with pytest.raises(HypervisorError, match="quarantined and keeps slot 0 of port0"):
            await manager.detach(reference)
        with pytest.raises(StateError, match="is quarantined and cannot be asked to detach"):
            await manager.detach(reference)
        await vms.confirm_removal("share-1")
        await wait_empty(manager)
