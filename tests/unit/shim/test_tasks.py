"""Tasks and execs: every question in every state."""

from __future__ import annotations

import pytest

from common import status
from common.errors import AlreadyExistsError, BugError, KataError, NotFoundError, StateError
from procs.shim.tasks import HALTED, Ask, Process, State, Stdio, Task

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
    (Ask.PAUSE, State.CREATED): (status.UNKNOWN, "cannot pause task in created state"),
    (Ask.PAUSE, State.STARTING): (status.UNKNOWN, "cannot pause task in created state"),
    (Ask.PAUSE, State.RUNNING): None,
    (Ask.PAUSE, State.STOPPED): (status.UNKNOWN, "cannot pause a stopped container"),
    (Ask.RESUME, State.CREATED): (status.UNKNOWN, "cannot resume task in created state"),
    (Ask.RESUME, State.STARTING): (status.UNKNOWN, "cannot resume task in created state"),
    (Ask.RESUME, State.RUNNING): (status.UNKNOWN, "cannot resume a running process"),
    (Ask.RESUME, State.PAUSING): (status.UNKNOWN, "cannot resume a process that is pausing"),
    (Ask.RESUME, State.PAUSED): None,
    (Ask.RESUME, State.RESUMING): (status.UNKNOWN, "cannot resume a process that is resuming"),
    (Ask.RESUME, State.STOPPED): (status.UNKNOWN, "cannot resume a stopped container"),
    (Ask.UPDATE, State.CREATED): None,
    (Ask.UPDATE, State.STARTING): (status.UNKNOWN, "cannot update a process that is starting"),
    (Ask.UPDATE, State.RUNNING): None,
    (Ask.UPDATE, State.STOPPED): (status.UNKNOWN, "cannot update a stopped container"),
    **{
        (ask, state): answer
        for state in HALTED
        for ask, answer in {
            Ask.START: (status.UNKNOWN, "cannot start a paused process"),
            Ask.KILL: None,
            Ask.DELETE: (status.UNKNOWN, "cannot delete a paused process"),
            Ask.EXEC: (status.FAILED_PRECONDITION, "cannot exec in a paused state"),
            Ask.PAUSE: (status.UNKNOWN, "cannot pause a paused container"),
            Ask.UPDATE: None,
        }.items()
    },
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
    for state in (State.STARTING, State.RUNNING, State.PAUSING, State.PAUSED, State.RESUMING, State.RUNNING):
        lived.move(state)
    lived.exited(3, now_ns=7)
    assert (lived.state, lived.exit_status, lived.exited_at_ns) == (State.STOPPED, 3, 7)


@pytest.mark.parametrize("state", [state for state in State if state is not State.STOPPED])
def test_a_process_can_end_in_any_state_but_once(state: State) -> None:
    ended = process(state)
    ended.exited(137, now_ns=1)
    with pytest.raises(BugError):
        ended.exited(0, now_ns=2)


def test_a_process_does_not_run_before_it_starts() -> None:
    with pytest.raises(BugError, match="cannot go from"):
        process().move(State.RUNNING)


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
