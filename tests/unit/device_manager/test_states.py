"""The life of a device: the table, and what it must never allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StateError
from procs.device_manager.states import TRANSITIONS, Event, State, after

ALIVE = [state for state in State if state is not State.GONE]


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_only_a_confirmation_frees_what_a_hypervisor_may_hold(events: list[Event]) -> None:
    """However events come, a device that was added is gone only by a removal or the end of its VM."""
    state, was_added = State.ATTACHING, False
    for event in events:
        try:
            state = after(state, event, "d")
        except StateError:
            continue
        was_added = was_added or event is Event.ADDED
        if state is State.GONE:
            assert event in {Event.REMOVED, Event.VM_ENDED} or not was_added
            return


@pytest.mark.parametrize("state", ALIVE)
def test_every_device_can_end(state: State) -> None:
    assert after(state, Event.VM_ENDED, "d") is State.GONE
    assert after(state, Event.REMOVED, "d") is State.GONE


def test_every_state_can_be_reached() -> None:
    assert set(TRANSITIONS.values()) | {State.ATTACHING} == set(State)


def test_a_removal_that_was_not_confirmed_is_quarantined_and_can_still_be_confirmed() -> None:
    state = after(State.DETACHING, Event.GAVE_UP, "d")
    assert state is State.QUARANTINED
    assert after(state, Event.REMOVED, "d") is State.GONE


def test_what_may_not_follow_names_device_state_and_event() -> None:
    with pytest.raises(StateError, match="device d7 is quarantined and cannot be confirmed by the guest"):
        after(State.QUARANTINED, Event.CONFIRMED, "d7")
