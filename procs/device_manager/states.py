r"""The life of one device. Pure: a state and an event give the next state and what is to be done about it.

::

    wanted --> attaching --added--> plugged --confirmed--> attached
                  |   \                |                      |
        unreached |    \ present       | detach               | detach
         / absent |     \              v                      v
                  |      `--------> detaching <---------------'
                  v                    |     \
                (gone) <-- removed ----+      `--> overdue -- present --> quarantined
                  ^--------------------'---------------'----- removed --------'

*An abort is no acknowledgement of the guest.* Some hypervisors take a device without asking the guest, which then keeps
a dead one. There (``is_guest_first``) a removal is asked for only when a holder says that the guest has let go. What is
given up without that word is quarantined until the word, or the VM's end, comes.

Any device is gone when its VM ends, and when the hypervisor says so; if nobody had asked for that, it is reported lost.
A device that is gone has no row any more: its bus, slot and source are free. Until then it keeps all three.

*What is true is asked, never concluded.* An add that was refused may have acted, so the hypervisor's list decides
(``ASK``). An add that was not answered may still act, so that the list would prove nothing: the same call is made again
(``REPEAT``), which the VM manager answers once. A removal that was accepted has not happened (``WATCH``); when it is
overdue the list decides, and a device that is still there is quarantined.

*Doubt is a normal event.* After our own start, or when the outcome of a command is not known, a device is ``RESUMED``:
its command is repeated, or the list is asked; of a removal both, since the answer to a repeated call is that of the
first, and what came of it may have been told to nobody. When the VM manager may have told us something that we
``MISSED``, the list is asked. Each state knows what to do then, so recovery is no other code than the normal way.
"""

from __future__ import annotations

from enum import StrEnum

from common.errors import StateError


class State(StrEnum):
    """Where a device is in its life; ``NEW`` and ``GONE`` are never stored."""

    NEW = "new"
    ATTACHING = "attaching"
    PLUGGED = "plugged"
    ATTACHED = "attached"
    DETACHING = "detaching"
    OVERDUE = "overdue"
    QUARANTINED = "quarantined"
    UNKNOWN = "unknown"
    GONE = "gone"


class Event(StrEnum):
    """What happens to a device: a wish, an answer of the VM manager, a fact, a time that has passed."""

    WANTED = "wanted"
    HELD = "wanted by another holder"
    CONFIRMED = "confirmed by the guest"
    RELEASED = "given back by a holder"
    DETACH = "asked to detach"
    ABORTED = "given up without the guest's word"

    ADDED = "added by the hypervisor"
    ACCEPTED = "accepted for removal"
    REFUSED = "refused by the VM manager"
    UNREACHED = "not asked, the VM manager was away"
    LOST_ANSWER = "asked, the VM manager went away"
    UNANSWERED = "not answered in time"

    PRESENT = "in the hypervisor's list"
    ABSENT = "not in the hypervisor's list"
    REMOVED = "removed by the hypervisor"
    FOUND = "found in the hypervisor, not known to us"
    VM_ENDED = "ended with its VM"

    OVERDUE = "not removed in time"
    TRY_AGAIN = "due for another request for removal"
    RESUMED = "in doubt and taken up again"
    MISSED = "perhaps changed while nobody listened"


class Action(StrEnum):
    """What is to be done. The first four are commands, carried out in order, one at a time in a sandbox."""

    ADD = "add"
    REPEAT = "repeat the add"
    REMOVE = "ask for the removal"
    ASK = "ask for the hypervisor's list"

    LEASE = "limit how long holders may stay unconfirmed"
    WATCH = "limit how long the removal may take"
    COOL = "wait until the removal may be asked for again"
    ANSWER = "tell who waits"
    REPORT_LOST = "publish that it is lost"
    REPORT_QUARANTINED = "publish that it is quarantined"


Step = tuple[State, tuple[Action, ...]]

LIVE = tuple(state for state in State if state not in {State.NEW, State.GONE})
USABLE = (State.PLUGGED, State.ATTACHED)
LEAVING = (State.DETACHING, State.OVERDUE)

_ANSWER = (Action.ANSWER,)
_LOST: Step = (State.GONE, (Action.REPORT_LOST, Action.ANSWER))

TRANSITIONS: dict[tuple[State, Event], Step] = {
    # What holds for every device, unless something below says otherwise.
    **{(state, Event.VM_ENDED): (State.GONE, _ANSWER) for state in LIVE},
    **{(state, Event.REMOVED): (State.GONE, _ANSWER) for state in LIVE},
    **{(state, Event.ABSENT): (State.GONE, _ANSWER) for state in LIVE},
    **{(state, Event.PRESENT): (state, _ANSWER) for state in LIVE},
    **{(state, Event.LOST_ANSWER): (state, _ANSWER) for state in LIVE},
    **{(state, Event.UNANSWERED): (state, _ANSWER) for state in LIVE},
    **{(state, Event.RESUMED): (state, (Action.ASK,)) for state in LIVE},
    **{(state, Event.MISSED): (state, (Action.ASK,)) for state in LIVE},
    # It comes.
    (State.NEW, Event.WANTED): (State.ATTACHING, (Action.ADD,)),
    (State.ATTACHING, Event.HELD): (State.ATTACHING, ()),
    (State.ATTACHING, Event.ADDED): (State.PLUGGED, (Action.LEASE, Action.ANSWER)),
    (State.ATTACHING, Event.UNREACHED): (State.GONE, _ANSWER),
    (State.ATTACHING, Event.REFUSED): (State.ATTACHING, (Action.ASK,)),
    (State.ATTACHING, Event.PRESENT): (State.DETACHING, (Action.REMOVE, Action.ANSWER)),
    (State.ATTACHING, Event.UNANSWERED): (State.ATTACHING, (Action.REPEAT, Action.ANSWER)),
    (State.ATTACHING, Event.RESUMED): (State.ATTACHING, (Action.REPEAT,)),
    (State.ATTACHING, Event.MISSED): (State.ATTACHING, ()),  # its add is being asked, or is repeated when resumed
    # It is used.
    (State.PLUGGED, Event.CONFIRMED): (State.ATTACHED, ()),
    (State.ATTACHED, Event.CONFIRMED): (State.ATTACHED, ()),
    **{(state, Event.HELD): (state, (Action.LEASE,)) for state in USABLE},
    **{(state, Event.RELEASED): (state, ()) for state in USABLE},
    **{(state, Event.DETACH): (State.DETACHING, (Action.REMOVE, Action.ANSWER)) for state in (*USABLE, State.UNKNOWN)},
    **{(state, Event.ABORTED): (State.DETACHING, (Action.REMOVE, Action.ANSWER)) for state in (*USABLE, State.UNKNOWN)},
    **{(state, Event.REMOVED): _LOST for state in USABLE},
    **{(state, Event.ABSENT): _LOST for state in USABLE},
    **{(state, Event.RESUMED): (state, (Action.LEASE, Action.ASK)) for state in USABLE},
    # It goes.
    (State.DETACHING, Event.ACCEPTED): (State.DETACHING, (Action.WATCH,)),
    (State.DETACHING, Event.REFUSED): (State.DETACHING, (Action.WATCH,)),  # it may have acted all the same
    (State.DETACHING, Event.UNANSWERED): (State.DETACHING, (Action.WATCH,)),
    (State.DETACHING, Event.RESUMED): (State.DETACHING, (Action.REMOVE, Action.ASK)),
    (State.DETACHING, Event.OVERDUE): (State.OVERDUE, (Action.ASK,)),
    (State.OVERDUE, Event.UNANSWERED): (State.OVERDUE, (Action.ASK,)),
    (State.OVERDUE, Event.PRESENT): (State.QUARANTINED, (Action.REPORT_QUARANTINED, Action.COOL, Action.ANSWER)),
    # It does not go.
    (State.QUARANTINED, Event.TRY_AGAIN): (State.QUARANTINED, (Action.REMOVE,)),
    **{
        (State.QUARANTINED, answer): (State.QUARANTINED, (Action.COOL, Action.ANSWER))
        for answer in (Event.ACCEPTED, Event.REFUSED, Event.UNANSWERED, Event.PRESENT)
    },
    # It was here before us: it may be on its way out, what is seen twice is there.
    (State.NEW, Event.FOUND): (State.UNKNOWN, (Action.ASK,)),
}

_KEPT: Step = (State.QUARANTINED, (Action.REPORT_QUARANTINED, Action.ANSWER))

GUEST_FIRST: dict[tuple[State, Event], Step] = {
    **{(state, Event.ABORTED): _KEPT for state in (*USABLE, State.UNKNOWN)},
    (State.ATTACHING, Event.PRESENT): _KEPT,  # a guest that looked for another device has found it
    (State.QUARANTINED, Event.RELEASED): (State.QUARANTINED, _ANSWER),
    (State.QUARANTINED, Event.ABORTED): (State.QUARANTINED, _ANSWER),
    (State.QUARANTINED, Event.DETACH): (State.DETACHING, (Action.REMOVE, Action.ANSWER)),
    (State.QUARANTINED, Event.TRY_AGAIN): (State.QUARANTINED, ()),
}
"""What holds instead for a device that the guest must have let go of before its removal is asked for."""


def after(state: State, event: Event, device_id: str, *, is_guest_first: bool = False) -> Step:
    """Return the state that follows and what is to be done.

    Args:
        state: the device's.
        event: what happened to it.
        device_id: which device.
        is_guest_first: see :attr:`common.services.vmm.AddedDevice.is_guest_first`.

    Raises:
        StateError: nothing may follow; the message names the device, its state and the event.
    """
    try:
        return (GUEST_FIRST.get((state, event)) if is_guest_first else None) or TRANSITIONS[state, event]
    except KeyError:
        raise StateError(f"device {device_id} is {state} and cannot be {event}") from None
