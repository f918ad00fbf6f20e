"""What the agent does to a whole container: in a real VM, by its cgroup."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common import status
from common.protocols.agent import ContainerRequest, Empty
from common.testing.guest_sandbox import see_cgroups
from common.testing.guest_vm import AgentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.guest_sandbox import GuestSandbox, Task


@pytest.fixture
def ticking(guest: GuestSandbox) -> Iterator[Task]:
    """A container that writes a dot whenever it may."""
    task = guest.run("sh", "-c", "while :; do printf .; sleep 0.01; done")
    yield task
    task.kill()


def ask(guest: GuestSandbox, method: str, task: Task) -> None:
    """Call a method that is only told which container."""
    guest.agent.ask(method, ContainerRequest(container_id=task.container_id), Empty)


def processor_time(guest: GuestSandbox, task: Task) -> bytes:
    """Return how long the processes of a container have run, as another container sees it."""
    reader = guest.run("cat", f"/sys/fs/cgroup/{task.container_id}/cpu.stat", adjust=see_cgroups)
    said = reader.stdout.read_all()
    assert reader.wait() == 0
    return said


def test_a_paused_container_stands_still_and_goes_on(guest: GuestSandbox, ticking: Task) -> None:
    ticking.stdout.read_until(b".")
    ask(guest, "PauseContainer", ticking)
    assert processor_time(guest, ticking) == processor_time(guest, ticking)
    ask(guest, "ResumeContainer", ticking)
    ticking.stdout.read_until(b"." * 50)


def test_nothing_is_executed_in_a_paused_container(guest: GuestSandbox, ticking: Task) -> None:
    ask(guest, "PauseContainer", ticking)
    with pytest.raises(AgentError, match="is paused") as refused:
        guest.exec(ticking, "true")
    assert refused.value.code == status.FAILED_PRECONDITION
    ask(guest, "ResumeContainer", ticking)
    assert guest.exec(ticking, "true").wait() == 0


@pytest.mark.parametrize("to_all", [True, False])
def test_a_paused_container_dies_of_sigkill(guest: GuestSandbox, to_all: bool) -> None:
    task = guest.run("sleep", "1000")
    ask(guest, "PauseContainer", task)
    task.signal(9, to_all=to_all)
    assert task.wait() == 137


def test_both_may_be_asked_twice(guest: GuestSandbox, ticking: Task) -> None:
    for method in ("PauseContainer", "PauseContainer", "ResumeContainer", "ResumeContainer"):
        ask(guest, method, ticking)
    assert guest.exec(ticking, "true").wait() == 0


@pytest.mark.parametrize("method", ["PauseContainer", "ResumeContainer"])
def test_what_does_not_run_is_not_paused(guest: GuestSandbox, method: str) -> None:
    task = guest.create("true")
    with pytest.raises(AgentError, match="is created, not running"):
        ask(guest, method, task)
    task.start()
    task.wait()
    with pytest.raises(AgentError, match="is exited, not running"):
        ask(guest, method, task)
