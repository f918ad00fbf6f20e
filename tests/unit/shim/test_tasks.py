"""Tasks and execs: every question in every state."""

from __future__ import annotations

import pytest

from common import status
from common.errors import AlreadyExistsError, BugError, KataError, NotFoundError, StateError
from procs.shim.tasks import Ask, Process, State, Stdio, Task

ANSWERS: dict[tuple[Ask, State], tuple[int, str] | None] = {
    (Ask.START, State.CREATED): None,
    (Ask.START, State.STARTING): (status.UNKNOWN, "cannot start a process that is starting"),
    (Ask.START, State.RUNNING): (status.UNKNOWN, "cannot start a running process"),
    (Ask.START, State.STOPPED): (status.FAILED_PRECONDITION, "cannot start a stopped process"),
    (Ask.KILL, State.CREATED): None,
    (Ask.KILL, State.STARTING): (status.FAILED_PRECONDITION, "process not created"),
    (Ask.KILL, State.RUNNING): None,
    (Ask.KILL, State.STOPPED): (status.NOT_FOUND, "process already finished"),
    (Ask.DELETE, State.CREATED): None,
    (Ask.DELETE, State.STARTING): (status.UNKNOWN, "cannot delete a running process"),
    (Ask.DELETE, State.RUNNING): (status.UNKNOWN, "cannot delete a running process"),
    (Ask.DELETE, State.STOPPED): None,
    (Ask.EXEC, State.CREATED): None,
    (Ask.EXEC, State.STARTING): (status.FAILED_PRECONDITION, "cannot exec in a created state"),
    (Ask.EXEC, State.RUNNING): None,
    (Ask.EXEC, State.STOPPED): (status.FAILED_PRECONDITION, "cannot exec in a stopped state"),
}


def process(state: State = State.CREATED, exec_id: str = "") -> Process:
    return Process(container_id="c", exec_id=exec_id, stdio=Stdio(), state=state)


@pytest.mark.parametrize("ask", Ask)
@pytest.mark.parametrize("state", State)
def test_every_question_has_its_answer_in_every_state(ask: Ask, state: State) -> None:
    expected = ANSWERS[ask, state]
    if expected is None:
        process(state).check(ask)
        return
    with pytest.raises(KataError) as refused:
        process(state).check(ask)
    assert (refused.value.code, refused.value.message) == expected


def test_an_exec_that_was_not_started_cannot_be_killed() -> None:
    with pytest.raises(StateError, match="process not created"):
        process(exec_id="e").check(Ask.KILL)


def test_a_life_in_order() -> None:
    lived = process()
    lived.starting()
    lived.started()
    lived.exited(3, now_ns=7)
    assert (lived.state, lived.exit_status, lived.exited_at_ns) == (State.STOPPED, 3, 7)


@pytest.mark.parametrize("state", [State.CREATED, State.STARTING, State.RUNNING])
def test_a_process_can_end_in_any_state_but_once(state: State) -> None:
    ended = process(state)
    ended.exited(137, now_ns=1)
    with pytest.raises(BugError):
        ended.exited(0, now_ns=2)


def test_a_process_does_not_run_before_it_starts() -> None:
    with pytest.raises(BugError, match="cannot go from"):
        process().started()


def test_exec_ids_are_unique_in_a_container() -> None:
    task = Task(init=process(State.RUNNING))
    added = task.add_exec("e", Stdio(stdout="/out"))
    assert task.process("e") is added
    assert task.process("") is task.init
    for taken in ("e", "c", ""):
        with pytest.raises(AlreadyExistsError, match=f"id {taken}"):
            task.add_exec(taken, Stdio())


def test_an_unknown_exec_is_named() -> None:
    with pytest.raises(NotFoundError, match="process does not exist zz"):
        Task(init=process()).process("zz")


def test_nothing_is_executed_in_an_ended_container() -> None:
    with pytest.raises(StateError, match="cannot exec in a stopped state"):
        Task(init=process(State.STOPPED)).add_exec("e", Stdio())
