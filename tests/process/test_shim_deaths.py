"""The shim, the VM or the VM manager dies under a container: exits are told, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from common.errors import GuestError, NotFoundError
from common.linux import identity
from common.protocols import task
from common.testing.shim_client import KILLED, Shim, started
from common.testing.shim_stand import stand_test
from procs.shim import record

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


@stand_test
async def test_the_death_of_the_vmm_ends_every_process(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    await shim.exec("e1", "sleep", "1000")
    await shim.start("e1")
    await stand.vms.end_vm()
    assert list(await asyncio.gather(shim.wait(), shim.wait("e1"))) == [KILLED, KILLED]
    topics = await stand.containerd.wait_topics(6)
    assert topics[4:] == ["/tasks/exit", "/tasks/exit"]
    await shim.delete()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_the_end_works_without_the_vm_manager(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("true")
    await shim.start()
    stand.vms.destroy_error = GuestError("the manager is not well")
    await shim.wait()
    await shim.delete()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.vms.process is not None
    await stand.vms.process.wait()
    assert stand.leftovers() == []


@stand_test
async def test_delete_cleans_up_after_a_killed_shim(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    shim_pid = stand.shim_pid
    await stand.kill_shim()
    done = await stand.delete()
    response = task.DeleteResponse.decode(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (response.pid, response.exit_status) == (shim_pid, KILLED)
    assert response.exited_at is not None
    assert stand.vms.process is not None
    await stand.vms.process.wait()
    assert stand.leftovers() == []
    again = await stand.delete()
    assert (again.returncode, task.DeleteResponse.decode(again.stdout).exit_status) == (0, KILLED)


@pytest.mark.soak
@stand_test
async def test_delete_takes_less_than_a_second(stand: ShimStand) -> None:
    """The fastest of three counts: what else the machine does only adds to it."""
    took = []
    for _ in range(3):
        shim = await started(stand)
        await shim.create("sleep", "1000")
        await shim.start()
        await stand.kill_shim()
        began = time.monotonic()
        await stand.delete()
        took.append(time.monotonic() - began)
        assert stand.leftovers() == []
    assert min(took) < 1


@stand_test
async def test_a_living_shim_keeps_its_name_and_a_dead_one_does_not(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    refused = await stand.run("start")
    assert refused.returncode == 1
    assert f"{stand.id} runs already, for bundle {stand.bundle} in namespace test" in refused.stderr.decode()
    await shim.start()
    await stand.kill_shim()
    again = Shim(stand, await stand.start())
    assert await again.create("true") > 0


@stand_test
async def test_delete_leaves_alone_what_lives_for_another_bundle(stand: ShimStand) -> None:
    """As containerd asks when it finds the bundle of a `start` that was refused, since the id is taken."""
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    own, stand.bundle = stand.bundle, stand.root / "other"
    stand.bundle.mkdir()
    done = await stand.delete()
    stand.bundle = own
    assert (done.returncode, task.DeleteResponse.decode(done.stdout).pid) == (0, 0)
    assert (await shim.state()).status == task.RUNNING


@stand_test
async def test_a_container_that_could_not_be_created_keeps_no_vm(stand: ShimStand) -> None:
    """As when containerd and its client die while the guest boots: the FIFOs go, and nobody asks for the end."""
    shim = await started(stand)
    with pytest.raises(NotFoundError, match="gone does not exist"):
        await shim.create("true", stdout=str(stand.root / "gone"))
    assert stand.vms.process is not None
    await stand.vms.process.wait()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_signal_does_not_end_the_shim(stand: ShimStand) -> None:
    shim = await started(stand)
    os.kill(stand.shim_pid, 15)
    assert await shim.create("true") > 0


@stand_test
async def test_what_an_earlier_boot_left_is_cleared_and_its_pids_mean_nobody(stand: ShimStand) -> None:
    """The run directory is on a disk, and the host was switched off under a container."""
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        leave_behind(stand, bystander.pid)
        shim = await started(stand)
        assert not (stand.sandbox_dir / "vm/old").exists()
        await shim.create("true")
        await shim.delete()
        await shim.shutdown()
        await stand.wait_shim_gone()
        leave_behind(stand, bystander.pid)
        assert (await stand.delete()).returncode == 0
        assert stand.leftovers() == []
        assert bystander.returncode is None
    finally:
        bystander.kill()
        assert await bystander.wait() == -signal.SIGKILL


def leave_behind(stand: ShimStand, pid: int) -> None:
    """Make what a shim of another boot had, whose pid is somebody else's now."""
    (stand.sandbox_dir / "vm").mkdir(parents=True)
    (stand.sandbox_dir / "vm/old").touch()
    record.write(stand.id, namespace="test", bundle=str(stand.bundle), socket=str(stand.root / "old.sock"))
    path = stand.sandbox_dir / record.FILE
    ours = {"pid": pid, "start_time": identity.start_time(pid), "boot_id": "another"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **ours}))
