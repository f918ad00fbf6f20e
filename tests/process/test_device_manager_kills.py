"""The device manager killed at each point of its code that has a name: its successor finishes, callers are answered."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from common import paths
from common.errors import HypervisorError, InterruptedCallError, StateError, UnavailableError
from common.testing.device_stand import Stand, standing
from common.testing.isolation import in_event_loop
from procs.device_manager.states import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent.parent
WHEN_ALL_IS_WELL = (
    "claim:taken",
    "attaching:recorded",
    "add:intended",
    "add:answered",
    "plugged:recorded",
    "attached:recorded",
    "detaching:recorded",
    "remove:intended",
    "remove:accepted",
    "removed:heard",
    "row:removed",
    "gone:recorded",
)
ON_THE_WAY_TO_QUARANTINE = ("detaching:recorded", "remove:accepted", "overdue:recorded", "quarantined:recorded")
BEFORE_AN_ANSWER = ("reply:made", "reply:remembered")
WHEN_ITS_JOURNAL_IS_LOST = "unknown:recorded"


async def insisted(stand: Stand, call: Callable[[], Awaitable[T]]) -> T:
    """Make a call until it is answered, as a caller does that repeats its call id; restart who dies of it."""
    while True:
        try:
            return await call()
        except (InterruptedCallError, UnavailableError):
            await asyncio.to_thread(stand.process.wait)
            await stand.start()


async def restarted(stand: Stand, point: str) -> None:
    """Replace the device manager by one that dies when it comes to a point."""
    stand.kill()
    await stand.start(fatal=f"{point}:kill")


async def cycle(stand: Stand) -> None:
    """Attach, confirm, detach."""
    attached = await insisted(stand, lambda: stand.attach(call_id="attach"))
    assert attached.state == "plugged"
    assert list(stand.vms.present) == ["share-1"], "one device, however often it was asked for"
    await insisted(stand, lambda: stand.confirm(attached))
    await insisted(stand, lambda: stand.detach(attached, call_id="detach"))


@pytest.mark.parametrize("point", WHEN_ALL_IS_WELL)
@in_event_loop
async def test_killed_at_any_point_it_converges(point: str) -> None:
    async with standing() as stand:
        await restarted(stand, point)
        victim = stand.process
        await cycle(stand)
        await asyncio.to_thread(victim.wait)
        if stand.process is victim:  # it died after the last answer
            await stand.start()
        await stand.wait_devices({})
        assert stand.vms.present == {}
        assert stand.vms.removals == ["share-1"]


@pytest.mark.parametrize("point", BEFORE_AN_ANSWER)
@in_event_loop
async def test_killed_before_its_answer_is_out_the_caller_gets_it_all_the_same(point: str) -> None:
    async with standing() as stand:
        await stand.attach("other")
        stand.kill()
        await stand.start(fatal=f"{point}:kill:2")  # the first answer is to the question whether it is there
        victim = stand.process
        attached = await insisted(stand, lambda: stand.attach(call_id="attach"))
        assert stand.process is not victim
        assert list(stand.vms.present) == ["share-1", attached.hypervisor_id]


@pytest.mark.parametrize("point", ON_THE_WAY_TO_QUARANTINE)
@in_event_loop
async def test_killed_while_a_guest_does_not_let_go_the_device_is_quarantined(point: str) -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        await restarted(stand, point)
        victim = stand.process
        attached = await stand.attach()
        with pytest.raises((HypervisorError, StateError), match="quarantined"):
            await insisted(stand, lambda: stand.detach(attached))
        assert stand.process is not victim
        assert stand.vms.removals == ["share-1"], "asked once, whoever died meanwhile"
        assert (await stand.attach("b")).bus == "port1"
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({"share-2": "plugged"})


@in_event_loop
async def test_killed_while_it_rebuilds_a_lost_journal_its_successor_does() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        stand.kill()
        for file in (Path(paths.run_dir()) / "device-manager").iterdir():
            file.unlink()
        stand.spawn(fatal=f"{WHEN_ITS_JOURNAL_IS_LOST}:kill")
        await asyncio.to_thread(stand.process.wait)
        await stand.start()
        await stand.wait_devices({"share-1": "unknown"})


def test_every_point_of_the_code_is_tested() -> None:
    files = [*(ROOT / "procs/device_manager").glob("*.py"), ROOT / "common/bus/server.py"]
    named = {point for file in files for point in re.findall(r'reach\("([a-z:]+)"\)', file.read_text())}
    named |= {f"{state}:recorded" for state in State if state is not State.NEW}
    assert named == {*WHEN_ALL_IS_WELL, *BEFORE_AN_ANSWER, *ON_THE_WAY_TO_QUARANTINE, WHEN_ITS_JOURNAL_IS_LOST}
