"""The life of a device: the table, and what it must never allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StateError
from procs.device_manager.commands import ANSWERS
from procs.device_manager.states import LIVE, TRANSITIONS, USABLE, Action, Event, State, after


@given(st.lists(st.sampled_from(Event), max_size=40), st.booleans())
def test_only_the_hypervisor_frees_what_it_may_hold(events: list[Event], is_guest_first: bool) -> None:
    """However events come, a device that was asked for is gone by the hypervisor's word or the end of its VM only."""
    state, was_asked = State.ATTACHING, False
    for event in events:
        if event is Event.UNREACHED and was_asked:
            continue  # a repeated add has no such outcome
        try:
            state, _ = after(state, event, "d", is_guest_first=is_guest_first)
        except StateError:
            continue
        was_asked = was_asked or event is not Event.HELD
        if state is State.GONE:
            assert event in {Event.REMOVED, Event.ABSENT, Event.VM_ENDED, Event.UNREACHED}
            return


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_where_the_guest_goes_first_no_removal_is_asked_for_without_its_word(events: list[Event]) -> None:
    state, is_let_go = State.ATTACHING, False
    for event in events:
        try:
            state, actions = after(state, event, "d", is_guest_first=True)
        except StateError:
            continue
        is_let_go = is_let_go or event is Event.DETACH
        assert is_let_go or Action.REMOVE not in actions
        assert is_let_go or state not in {State.DETACHING, State.OVERDUE}


def test_without_the_guests_word_a_device_is_quarantined_until_that_comes() -> None:
    for state in USABLE:
        assert after(state, Event.ABORTED, "d")[0] is State.DETACHING, "the hypervisor asks the guest"
        kept = after(state, Event.ABORTED, "d", is_guest_first=True)
        assert kept == (State.QUARANTINED, (Action.REPORT_QUARANTINED, Action.ANSWER))
    let_go = after(State.QUARANTINED, Event.DETACH, "d", is_guest_first=True)
    assert let_go == (State.DETACHING, (Action.REMOVE, Action.ANSWER))
    with pytest.raises(StateError):
        after(State.QUARANTINED, Event.DETACH, "d")


def test_only_a_first_add_can_be_known_not_to_have_been_asked() -> None:
    outcomes = {action: {event for _, event in answers} for action, answers in ANSWERS.items()}
    assert [action for action, events in outcomes.items() if Event.UNREACHED in events] == [Action.ADD]


@pytest.mark.parametrize("state", LIVE)
def test_every_device_can_end(state: State) -> None:
    for event in (Event.VM_ENDED, Event.REMOVED, Event.ABSENT):
        assert after(state, event, "d")[0] is State.GONE


@pytest.mark.parametrize("state", LIVE)
def test_every_device_that_is_resumed_asks_what_is_true(state: State) -> None:
    _, actions = after(state, Event.RESUMED, "d")
    assert {Action.REPEAT, Action.REMOVE, Action.ASK} & set(actions)


@pytest.mark.parametrize("state", USABLE)
def test_a_device_that_vanishes_is_reported_unless_somebody_asked_for_it(state: State) -> None:
    assert Action.REPORT_LOST in after(state, Event.REMOVED, "d")[1]
    assert Action.REPORT_LOST not in after(State.DETACHING, Event.REMOVED, "d")[1]
    assert Action.REPORT_LOST not in after(state, Event.VM_ENDED, "d")[1]


def test_every_state_can_be_reached_and_every_action_is_called_for() -> None:
    assert {state for state, _ in TRANSITIONS.values()} | {State.NEW} == set(State)
    assert {action for _, actions in TRANSITIONS.values() for action in actions} == set(Action)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_a_removal_that_was_not_confirmed_is_quarantined_and_can_still_be_confirmed() -> None:
    assert after(State.DETACHING, Event.PRESENT, "d")[0] is State.DETACHING
    assert after(State.DETACHING, Event.OVERDUE, "d") == (State.OVERDUE, (Action.ASK,))
    assert after(State.OVERDUE, Event.PRESENT, "d")[0] is State.QUARANTINED
    assert after(State.QUARANTINED, Event.REMOVED, "d")[0] is State.GONE


def test_what_may_not_follow_names_device_state_and_event() -> None:
    with pytest.raises(StateError, match="device d7 is quarantined and cannot be confirmed by the guest"):
        after(State.QUARANTINED, Event.CONFIRMED, "d7")
