"""While much output flows the agent does not push its way before the process that makes it.

A process that writes into an empty pipe wakes us, and the scheduler lets who has slept go first: we would take each
64 KiB as it comes. A batch task waits for its turn (SCHED_BATCH in sched(7)): by then the pipe is full, and a frame
costs the same whatever is in it. Else we are wanted at once, so it ends with the output. Children inherit it, so who
starts one says what it is to be (``crun``).
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reactor import Reactor

_LOOK_S = 0.1


class Patience:
    """Ours, for all streams together."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._flows = False
        self._is_patient = False

    def note_flow(self) -> None:
        """Note that much output has come."""
        self._flows = True
        if not self._is_patient:
            self._be(posix.SCHED_BATCH)
            self._reactor.later(_LOOK_S, self._look)

    def _look(self) -> None:
        """Be as before, if nothing has come since."""
        if self._flows:
            self._flows = False
            self._reactor.later(_LOOK_S, self._look)
        else:
            self._be(posix.SCHED_OTHER)

    def _be(self, policy: int) -> None:
        self._is_patient = policy == posix.SCHED_BATCH
        posix.sched_setscheduler(0, policy, posix.sched_param(0))
