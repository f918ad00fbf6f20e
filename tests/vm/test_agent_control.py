"""What the agent does to a whole container: in a real VM, by its cgroup."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from common import status
from common.protocols import oci
from common.protocols.agent import (
    AGENT_SERVICE,
    ContainerRequest,
    Empty,
    OomEvent,
    UpdateContainerRequest,
    WaitProcessResponse,
)
from common.protocols.stats import NO_LIMIT, OOM_KILLS, CgroupStats, StatsContainerResponse
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import see_cgroups

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


def stats(guest: GuestSandbox, task: Task) -> CgroupStats:
    """Ask what a container has used."""
    request = ContainerRequest(container_id=task.container_id)
    answer = guest.agent.ask("StatsContainer", request, StatsContainerResponse).cgroup_stats
    assert answer is not None
    return answer


def limited(limit: int) -> oci.LinuxResources:
    """Return a limit of memory, in bytes, without swap."""
    return oci.LinuxResources(memory=oci.LinuxMemory(limit=limit, swap=limit), pids=oci.LinuxPids(limit=20))


def update(guest: GuestSandbox, task: Task, resources: oci.LinuxResources) -> None:
    """Change limits."""
    guest.agent.ask(
        "UpdateContainer", UpdateContainerRequest(container_id=task.container_id, resources=resources), Empty
    )


def test_statistics_are_those_of_the_containers_cgroup(guest: GuestSandbox, ticking: Task) -> None:
    first = stats(guest, ticking)
    ticking.stdout.read_until(b"." * 20)
    second = stats(guest, ticking)
    for answer in (first, second):
        assert answer.pids_stats
        assert answer.pids_stats.current in (1, 2)
        assert answer.memory_stats
        assert answer.memory_stats.usage
        assert 0 < answer.memory_stats.usage.usage < 64 << 20
        assert answer.memory_stats.usage.limit == NO_LIMIT
        assert answer.memory_stats.stats["anon"] > 0
        assert answer.memory_stats.stats[OOM_KILLS] == 0
        assert answer.cpu_stats
        assert answer.cpu_stats.cpu_usage
    assert first.cpu_stats
    assert first.cpu_stats.cpu_usage
    assert second.cpu_stats
    assert second.cpu_stats.cpu_usage
    assert first.cpu_stats.cpu_usage.total < second.cpu_stats.cpu_usage.total


def test_statistics_before_the_start_are_zeros(guest: GuestSandbox) -> None:
    task = guest.create("true")
    answer = stats(guest, task)
    assert answer.pids_stats
    assert (answer.pids_stats.current, answer.hugetlb_stats) == (0, {})
    task.start()
    task.wait()


def test_limits_change_while_it_runs(guest: GuestSandbox, ticking: Task) -> None:
    update(guest, ticking, limited(48 << 20))
    answer = stats(guest, ticking)
    assert answer.memory_stats
    assert answer.memory_stats.usage
    assert answer.memory_stats.usage.limit == 48 << 20
    assert answer.pids_stats
    assert answer.pids_stats.limit == 20
    update(guest, ticking, oci.LinuxResources(cpu=oci.LinuxCPU(quota=20_000, period=100_000)))
    reader = guest.run("cat", f"/sys/fs/cgroup/{ticking.container_id}/cpu.max", adjust=see_cgroups)
    assert (reader.stdout.read_all(), reader.wait()) == (b"20000 100000\n", 0)
    answer = stats(guest, ticking)
    assert answer.memory_stats
    assert answer.memory_stats.usage
    assert answer.memory_stats.usage.limit == 48 << 20, "what an update does not mention stays"


def test_limits_that_change_before_the_start_hold_from_the_start(guest: GuestSandbox) -> None:
    task = guest.create("sleep", "1000")
    update(guest, task, limited(32 << 20))
    update(guest, task, oci.LinuxResources(memory=oci.LinuxMemory(limit=40 << 20, swap=40 << 20)))
    task.start()
    answer = stats(guest, task)
    assert answer.memory_stats
    assert answer.memory_stats.usage
    assert answer.memory_stats.usage.limit == 40 << 20
    assert answer.pids_stats
    assert answer.pids_stats.limit == 20
    task.kill()


def test_who_runs_out_of_memory_is_told_before_its_end(guest: GuestSandbox) -> None:
    def limit(spec: oci.Spec) -> None:
        assert spec.linux
        spec.linux.resources = limited(24 << 20)

    asked = guest.agent.begin(AGENT_SERVICE, "GetOOMEvent", Empty())
    task = guest.run("tail", "/dev/zero", adjust=limit)
    waiting = task.begin_wait()
    assert guest.agent.finish(asked, OomEvent).container_id == task.container_id
    assert not guest.agent.is_answered(waiting)
    assert guest.agent.finish(waiting, WaitProcessResponse).status == 137
    task.close()


def test_memory_that_runs_out_in_an_exec_is_told_as_well(guest: GuestSandbox) -> None:
    def limit(spec: oci.Spec) -> None:
        assert spec.linux
        spec.linux.resources = limited(24 << 20)

    task = guest.run("sleep", "1000", adjust=limit)
    assert guest.exec(task, "tail", "/dev/zero").wait() == 137
    assert guest.agent.ask("GetOOMEvent", Empty(), OomEvent).container_id == task.container_id  # it happened before
    answer = stats(guest, task)
    assert answer.memory_stats
    assert answer.memory_stats.stats[OOM_KILLS] == 1
    task.kill()


def test_only_the_last_call_waits_for_memory_to_run_out(guest: GuestSandbox) -> None:
    first = guest.agent.begin(AGENT_SERVICE, "GetOOMEvent", Empty())
    guest.agent.begin(AGENT_SERVICE, "GetOOMEvent", Empty())
    with pytest.raises(AgentError, match="another call waits") as refused:
        guest.agent.finish(first, OomEvent)
    assert refused.value.code == status.ABORTED


def test_an_idle_agent_sleeps(guest: GuestSandbox) -> None:
    """Each wake-up is a switch of its own will (proc_pid_status(5)); a container in its namespace counts them."""
    count = "count() { sed -n 's/^voluntary_ctxt_switches:\t//p' /proc/1/status; }"
    script = f"{count}; sleep 2; a=$(count); sleep 10; echo $a $(count)"
    task = guest.run("sh", "-c", script, pid="/proc/1/ns/pid")
    first, last = map(int, task.stdout.read_all().split())
    assert task.wait() == 0
    assert last - first < 5


def policies(*pids: str) -> str:
    """Return a script that prints the scheduling policies of processes (proc_pid_stat(5): the 41st field)."""
    return "cut -d' ' -f41 " + " ".join(f"/proc/{pid}/stat" for pid in pids)


def test_the_agent_is_a_batch_task_while_much_output_flows_and_nothing_else_is(guest: GuestSandbox) -> None:
    """3 is SCHED_BATCH (sched(7)); the container shares the agent's namespace."""
    script = f"dd if=/dev/zero bs=64k count=32 2>/dev/null; {policies('1', 'self')} >&2; sleep 1; {policies('1')} >&2"
    task = guest.run("sh", "-c", script, pid="/proc/1/ns/pid")
    assert task.stderr is not None
    assert len(task.stdout.read_all()) == 32 * (64 << 10)
    assert task.stderr.read_all().split() == [b"3", b"0", b"0"]
    assert task.wait() == 0
    task.remove()


def test_what_is_started_while_output_flows_is_as_ever(guest: GuestSandbox) -> None:
    script = "for n in $(seq 20); do dd if=/dev/zero bs=64k count=8 2>/dev/null; usleep 50000; done"
    task = guest.run("sh", "-c", script, pid="/proc/1/ns/pid")
    flow = task.stdout.chunks()
    next(flow)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(lambda: sum(map(len, flow)))
        other = guest.exec(task, "sh", "-c", policies("self"))
        assert other.stdout.read_all() == b"0\n"
        assert other.wait() == 0
        assert drained.result() > 9 << 20
    assert task.wait() == 0
    task.remove()
