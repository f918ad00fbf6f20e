"""Exit codes of processes that crun leaves to us, in every order in which they can be heard of."""

from __future__ import annotations

import pytest

from guest.agent.reaper import Exits

RUNTIME, PROCESS = 10, 11


class Recorder:
    """Watches the process when the runtime has ended, as whoever reads the pid file does."""

    def __init__(self) -> None:
        self.exits = Exits()
        self.seen: list[int] = []
        self.exits.watch_runtime(RUNTIME, self._on_runtime)

    def _on_runtime(self, _status: int) -> None:
        self.exits.watch(PROCESS, self.seen.append)


@pytest.mark.parametrize("order", [(RUNTIME, PROCESS), (PROCESS, RUNTIME)])
def test_the_order_of_exits_does_not_matter(order: tuple[int, int]) -> None:
    recorder = Recorder()
    for pid in order:
        recorder.exits.report(pid, pid)
    assert recorder.seen == [PROCESS]


def test_another_runtime_at_work_loses_nothing() -> None:
    recorder = Recorder()
    recorder.exits.watch_runtime(20, lambda _status: None)
    for pid in (PROCESS, 20, RUNTIME):
        recorder.exits.report(pid, pid)
    assert recorder.seen == [PROCESS]


def test_exits_of_strangers_are_not_kept() -> None:
    recorder = Recorder()
    for pid in (99, RUNTIME, PROCESS, 98):
        recorder.exits.report(pid, 5)
    later: list[int] = []
    for stranger in (98, 99):
        recorder.exits.watch(stranger, later.append)
    assert later == []


def test_a_pid_that_is_used_again_is_another_process() -> None:
    recorder = Recorder()
    recorder.exits.report(RUNTIME, 0)
    recorder.exits.report(PROCESS, 1)
    recorder.exits.report(PROCESS, 2)
    assert recorder.seen == [1]


def test_a_runtimes_bug_leaves_no_runtime_at_work() -> None:
    exits = Exits()

    def broken(_status: int) -> None:
        raise KeyError("pid")

    exits.watch_runtime(RUNTIME, broken)
    with pytest.raises(KeyError):
        exits.report(RUNTIME, 0)
    exits.report(PROCESS, 1)
    seen: list[int] = []
    exits.watch(PROCESS, seen.append)
    assert seen == []
