r"""The life of one device. Pure: a table of what may follow what.

::

    attaching --added--> plugged --confirmed--> attached --detach--> detaching --removed--> (gone)
        |                   |  \--detach------------------------------^   |
        +--failed-->(gone)  |                                             +--gave up--> quarantined --removed--> (gone)
                            +--removed or the VM ended, in any state--> (gone)

A device that is gone has no row any more: its bus and id are free. A quarantined one was never confirmed as removed:
it keeps both until the hypervisor confirms after all, or its VM ends.
"""

from __future__ import annotations

from enum import StrEnum

from common.errors import StateError


class State(StrEnum):
    """Where a device is in its life; ``GONE`` is never stored."""

    ATTACHING = "attaching"
    PLUGGED = "plugged"
    ATTACHED = "attached"
    DETACHING = "detaching"
    QUARANTINED = "quarantined"
    GONE = "gone"


class Event(StrEnum):
    """What happens to a device."""

    ADDED = "added by the hypervisor"
    FAILED = "refused by the hypervisor"
    CONFIRMED = "confirmed by the guest"
    DETACH = "asked to detach"
    REMOVED = "removed by the hypervisor"
    GAVE_UP = "not removed in time"
    VM_ENDED = "VM ended"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.ATTACHING, Event.ADDED): State.PLUGGED,
    (State.ATTACHING, Event.FAILED): State.GONE,
    (State.ATTACHING, Event.DETACH): State.DETACHING,
    (State.PLUGGED, Event.CONFIRMED): State.ATTACHED,
    (State.PLUGGED, Event.DETACH): State.DETACHING,
    (State.ATTACHED, Event.CONFIRMED): State.ATTACHED,
    (State.ATTACHED, Event.DETACH): State.DETACHING,
    (State.DETACHING, Event.DETACH): State.DETACHING,
    (State.DETACHING, Event.GAVE_UP): State.QUARANTINED,
    **{(state, Event.REMOVED): State.GONE for state in State if state is not State.GONE},
    **{(state, Event.VM_ENDED): State.GONE for state in State if state is not State.GONE},
}


def after(state: State, event: Event, device_id: str) -> State:
    """Return the state that follows.

    Raises:
        StateError: nothing may follow; the message names the device, its state and the event.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise StateError(f"device {device_id} is {state} and cannot be {event}") from None
