"""containerd dies: a shim without a container ends by itself, one with a container waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from common.protocols import task
from common.testing.isolation import in_event_loop
from common.testing.shim_client import Shim, refusal, started
from common.testing.shim_stand import stand_test
from common.ttrpc.server import TtrpcServer
from procs.shim.abandonment import wait_abandoned

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


@stand_test
async def test_before_create(stand: ShimStand) -> None:
    shim = await started(stand)
    shim.client.close()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_while_a_creation_fails(stand: ShimStand) -> None:
    """What was begun is finished first: the container might have come into being."""
    stand.vms.is_guest_silent = True
    shim = await started(stand)
    creating = stand.spawn(refusal(shim.create("sleep", "1000")))
    await shim.reached()
    shim.client.close()
    await creating
    await Shim(stand, await stand.connect()).reached()  # a containerd that has started again, and stays
    await stand.vms.end_vm()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_container_is_found_again(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    shim.client.close()
    again = Shim(stand, await stand.connect())
    assert (await again.state()).status == task.CREATED
    await again.start()
    await again.kill(9)
    await again.wait()
    again.client.close()
    last = Shim(stand, await stand.connect())
    assert (await last.state()).status == task.STOPPED
    await last.delete()
    last.client.close()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@in_event_loop
async def test_containerd_never_connected() -> None:
    is_unused = asyncio.Event()
    is_unused.set()
    async with asyncio.TaskGroup() as group:
        await wait_abandoned(TtrpcServer({}, group), is_unused, connect_timeout_s=0)
