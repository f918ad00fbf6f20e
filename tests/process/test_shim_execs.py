"""Execs: processes beside the container's own, with streams and ends of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, NotFoundError
from common.protocols import task
from common.protocols.events import TaskExit
from common.testing.shim_client import KILLED, Reader, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


@stand_test
async def test_execs_live_beside_the_container(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    out, err = Reader(stand, "out"), Reader(stand, "err")
    await shim.exec("e1", "sh", "-c", "echo out; echo err >&2; exit 7", stdout=out.path, stderr=err.path)
    assert (await shim.state("e1")).status == task.CREATED
    waiting = stand.spawn(shim.wait("e1"))
    await shim.start("e1")
    assert await waiting == 7
    assert [await out.all(), await err.all()] == [b"out\n", b"err\n"]
    state = await shim.state("e1")
    assert (state.id, state.exec_id, state.status, state.exit_status) == ("e1", "e1", task.STOPPED, 7)
    assert (await shim.delete("e1")).exit_status == 7
    with pytest.raises(NotFoundError, match="process does not exist e1"):
        await shim.state("e1")
    await shim.kill(9)
    assert await shim.wait() == KILLED
    topics = await stand.containerd.wait_topics(6)
    assert topics[2:6] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exit"]


@stand_test
async def test_exits_of_execs_are_told_before_the_containers(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    await shim.exec("e1", "sleep", "1000")
    await shim.start("e1")
    await shim.kill(9, is_all=True)
    assert await shim.wait() == KILLED
    assert await shim.wait("e1") == KILLED
    await stand.containerd.wait_topics(6)
    exits = [envelope.event for envelope in stand.containerd.envelopes if envelope.topic == "/tasks/exit"]
    assert [TaskExit.decode(event.value).id for event in exits if event is not None] == ["e1", stand.id]


@stand_test
async def test_execs_that_fail_cost_no_port(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(6):
        exec_id, path = f"e{number}", stand.fifo(f"out{number}")
        await shim.exec(exec_id, "no-such-command", stdout=path, stderr=path)
        with pytest.raises(KataError, match="executable file `no-such-command` not found"):
            await shim.start(exec_id)
        assert (await shim.delete(exec_id)).exit_status == 255
