"""The event loop: one ``epoll``, timers, and what is to happen soon.

Every descriptor is watched edge-triggered and once for all its life: a virtio port reports a hang-up for as long as the
host's end is closed, which would keep a level-triggered loop busy. A handler therefore goes on until the kernel says
EAGAIN, or comes back by :meth:`Reactor.soon` if others should have their turn first.
"""

from __future__ import annotations

import select
import time

from guest.agent.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, HANGUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP


class Timer:
    """Something that happens later, unless it is cancelled."""

    __slots__ = ("_callback", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """See to it that it does not happen."""
        self._callback = None

    def fire(self) -> None:
        """Let it happen."""
        if self._callback is not None:
            self._callback()


class Reactor:
    """Calls handlers, one at a time. An exception of one is logged and hurts no other."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._soon: list[Callable[[], None]] = []
        self._timers: list[Timer] = []

    def watch(self, descriptor: int, handler: Callable[[int], None], events: int = IN | OUT) -> None:
        """Call ``handler`` with the events (of ``IN``, ``OUT``, and always ``HANGUP``) of a non-blocking descriptor."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events | select.EPOLLET)

    def rewatch(self, descriptor: int, events: int) -> None:
        """Wait for other events of a descriptor; those that are there now are told too."""
        self._epoll.modify(descriptor, events | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor; call it before the descriptor is closed."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in the next round."""
        self._soon.append(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back after a time."""
        timer = Timer(time.monotonic() + seconds, callback)
        self._timers.append(timer)
        return timer

    def run(self) -> None:
        """Go round for ever."""
        while True:
            self.run_once()

    def run_once(self) -> None:
        """Wait for the next events and handle them."""
        for descriptor, events in self._epoll.poll(self._timeout()):
            handler = self._handlers.get(descriptor)  # none if an earlier handler of this round has closed it
            if handler is not None:
                _guard(handler, events)
        if self._soon or self._timers:
            for callback in [*self._take_soon(), *self._take_due()]:
                _guard(callback)

    def _take_soon(self) -> list[Callable[[], None]]:
        taken, self._soon = self._soon, []
        return taken

    def _take_due(self) -> list[Callable[[], None]]:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer.deadline <= now]
        self._timers = [timer for timer in self._timers if timer.deadline > now]
        return [timer.fire for timer in due]

    def _timeout(self) -> float | None:
        """Return for how many seconds to wait at most."""
        if self._soon:
            return 0
        return max(0, min(timer.deadline for timer in self._timers) - time.monotonic()) if self._timers else None


def _guard(callback: Callable[..., None], *arguments: int) -> None:
    try:
        callback(*arguments)
    except Exception as err:  # noqa: BLE001  # one of the marked places: a bug in one handler must not end the VM
        log("error", "handler failed", error=f"{type(err).__name__}: {err}", at=place_of(err))


def place_of(err: BaseException) -> str:
    """Return where an exception was raised; importing ``traceback`` would cost more than it tells."""
    trace = err.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
