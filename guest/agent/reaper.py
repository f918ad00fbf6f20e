"""Children: ours, and the orphans that PID 1 inherits.

A container's process is a grandchild: crun makes it, writes its pid to a file and exits, and the kernel gives the
process to us. It may end before crun does, so its exit can be seen before anybody knows what it was. While a runtime is
at work, exits of unknown processes are therefore kept, until the pid file has been read.
"""

from __future__ import annotations

import posix

from guest.agent.signals import wake_on_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reactor import Reactor


class Exits:
    """Brings exits and those who want to know of them together, in whichever order they come."""

    def __init__(self) -> None:
        self._watchers: dict[int, Callable[[int], None]] = {}
        self._unknown: dict[int, int] = {}
        self._runtimes_at_work = 0

    def watch(self, pid: int, on_exit: Callable[[int], None]) -> None:
        """Call ``on_exit`` with the status of a process: at once if it has ended already."""
        if pid in self._unknown:
            on_exit(self._unknown.pop(pid))
        else:
            self._watchers[pid] = on_exit

    def watch_runtime(self, pid: int, on_exit: Callable[[int], None]) -> None:
        """Watch a child that leaves grandchildren to us; ``on_exit`` must watch those that it knows."""
        self._runtimes_at_work += 1

        def finish(status: int) -> None:
            try:
                on_exit(status)
            finally:
                self._runtimes_at_work -= 1
                if not self._runtimes_at_work:
                    self._unknown.clear()

        self.watch(pid, finish)

    def report(self, pid: int, status: int) -> None:
        """Take the exit of a process: its code, or 128 and the signal that killed it."""
        watcher = self._watchers.pop(pid, None)
        if watcher is not None:
            watcher(status)
        elif self._runtimes_at_work:
            self._unknown[pid] = status


class Reaper(Exits):
    """Reaps every child and reports it."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__()
        self._reactor = reactor
        self._wakeup, wakeup = posix.pipe2(posix.O_NONBLOCK | posix.O_CLOEXEC)
        reactor.watch(self._wakeup, self._on_signal)
        wake_on_child(wakeup)

    def _on_signal(self, _events: int) -> None:
        try:
            while posix.read(self._wakeup, 512):
                pass
        except BlockingIOError:
            self._reap()

    def _reap(self) -> None:
        """Reap one child, and come back for the next: a watcher that fails must not cost the next exit its report."""
        try:
            pid, wait_status = posix.waitpid(-1, posix.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            self._reactor.soon(self._reap)
            code = posix.waitstatus_to_exitcode(wait_status)
            self.report(pid, code if code >= 0 else 128 - code)
