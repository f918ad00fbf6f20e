"""Pause and resume: what stands still, what is refused meanwhile, and what happens when the guest cannot."""

from __future__ import annotations

from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import pytest

from common import status
from common.errors import KataError, NotFoundError, StateError, UnsupportedError
from common.protocols import task
from common.testing.fake_guest import Refusal
from common.testing.shim_client import KILLED, Reader, Shim, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


async def running(stand: ShimStand, *args: str, stdout: str = "") -> Shim:
    """Return a shim whose container runs."""
    shim = await started(stand)
    await shim.create(*(args or ("sleep", "1000")), stdout=stdout)
    await shim.start()
    return shim


@stand_test
async def test_a_paused_container_and_its_execs_are_paused_and_go_on(stand: ShimStand) -> None:
    shim = await running(stand)
    await shim.exec("e1", "sleep", "1000")
    await shim.start("e1")
    await shim.exec("e2", "true")
    await shim.ask("Pause")
    states = [(await shim.state(exec_id)).status for exec_id in ("", "e1", "e2")]
    assert states == [task.PAUSED, task.PAUSED, task.CREATED]
    await shim.ask("Resume")
    assert [(await shim.state(exec_id)).status for exec_id in ("", "e1")] == [task.RUNNING, task.RUNNING]
    assert (await stand.containerd.wait_topics(7))[-2:] == ["/tasks/paused", "/tasks/resumed"]
    assert stand.vms.guest is not None
    assert stand.vms.guest.methods()[-2:] == ["PauseContainer", "ResumeContainer"]


@stand_test
async def test_what_a_paused_container_refuses(stand: ShimStand) -> None:
    shim = await running(stand)
    await shim.exec("e1", "true")
    await shim.ask("Pause")
    with pytest.raises(StateError, match="cannot exec in a paused state"):
        await shim.exec("e2", "true")
    with pytest.raises(StateError, match="cannot exec in a paused container"):
        await shim.start("e1")
    with pytest.raises(KataError, match="cannot pause a paused container"):
        await shim.ask("Pause")
    with pytest.raises(KataError, match="cannot delete a paused process"):
        await shim.delete()
    await shim.ask("Resume")
    await shim.start("e1")
    assert await shim.wait("e1") == 0


@stand_test
async def test_a_paused_container_can_be_killed(stand: ShimStand) -> None:
    shim = await running(stand)
    await shim.ask("Pause")
    await shim.kill(SIGKILL)
    assert await shim.wait() == KILLED
    assert (await shim.delete()).exit_status == KILLED


@stand_test
async def test_another_signal_waits_until_it_goes_on(stand: ShimStand) -> None:
    out = Reader(stand, "out")
    script = "trap 'kill $!; exit 5' TERM; sleep 1000 & echo ready; wait"  # ready when there is what holds the output
    shim = await running(stand, "sh", "-c", script, stdout=out.path)
    await out.until(b"ready")
    await shim.ask("Pause")
    await shim.kill(SIGTERM)
    assert (await shim.state()).status == task.PAUSED
    await shim.ask("Resume")
    assert await shim.wait() == 5


@pytest.mark.parametrize(("verb", "method"), [("Pause", "PauseContainer"), ("Resume", "ResumeContainer")])
def test_a_guest_that_cannot_leaves_it_as_it_was(verb: str, method: str) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        shim = await running(stand)
        if verb == "Resume":
            await shim.ask("Pause")
        before = (await shim.state()).status
        assert stand.vms.guest is not None
        stand.vms.guest.refusals[method] = Refusal(status.INTERNAL, "its processes did not stop within 10 s")
        with pytest.raises(KataError, match="its processes did not stop within 10 s"):
            await shim.ask(verb)
        assert (await shim.state()).status == before
        stand.vms.guest.refusals.clear()
        await shim.ask(verb)

    test()


@stand_test
async def test_the_vm_of_a_paused_container_may_die(stand: ShimStand) -> None:
    shim = await running(stand)
    await shim.ask("Pause")
    await stand.vms.end_vm()
    assert await shim.wait() == KILLED
    with pytest.raises(KataError, match="cannot resume a stopped container"):
        await shim.ask("Resume")


@stand_test
async def test_a_checkpoint_is_refused_and_changes_nothing(stand: ShimStand) -> None:
    shim = await running(stand)
    request = task.CheckpointTaskRequest(id=stand.id, path="/nowhere")
    with pytest.raises(UnsupportedError, match="cannot be checkpointed"):
        await stand.call(shim.client, "Checkpoint", request, task.Empty)
    assert (await shim.state()).status == task.RUNNING
    with pytest.raises(NotFoundError):
        await stand.call(shim.client, "Checkpoint", task.CheckpointTaskRequest(id="other"), task.Empty)
