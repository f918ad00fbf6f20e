"""A container's cgroup: who is in it, and what is done to all of them at once.

crun makes the cgroup and sets its limits; the agent uses what the kernel offers for the whole of it. Files and formats:
https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

from __future__ import annotations

import posix

from guest.agent.files import read_text, write_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reactor import Reactor

_ROOT = "/sys/fs/cgroup"
_FREEZE_TIMEOUT_S = 10
_MAX_EVENTS = 4096


class EventFile:
    """A file of the kernel that tells of its changes, as ``cgroup.events``: lines of a key and a number.

    Such a file is always readable and writable for ``epoll``; what counts is that it is reported anew with each change
    (``kernfs_notify``), and once at first.
    """

    def __init__(self, reactor: Reactor, path: str, on_change: Callable[[dict[str, int]], None]) -> None:
        self._reactor = reactor
        self._descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        reactor.watch(self._descriptor, lambda _events: on_change(self.read()))

    def read(self) -> dict[str, int]:
        """Return what it says; nothing if the cgroup is gone."""
        try:
            return read_numbers(posix.pread(self._descriptor, _MAX_EVENTS, 0).decode())
        except OSError:  # ENODEV
            return {}

    def close(self) -> None:
        """Listen no more."""
        self._reactor.unwatch(self._descriptor)
        posix.close(self._descriptor)


class Cgroup:
    """The cgroup of one container; it exists from the container's start to its removal.

    Attributes:
        path: its directory.
        is_frozen: whether its processes stand still, or are about to.
    """

    def __init__(self, reactor: Reactor, name: str) -> None:
        self.path = f"{_ROOT}/{name}"
        self.is_frozen = False
        self._reactor = reactor

    def processes(self) -> list[int]:
        """Return the pids in it."""
        return list(map(int, read_text(f"{self.path}/cgroup.procs").split()))

    def kill(self) -> None:
        """Kill all of them at once: none can fork away. Those that are frozen die as well."""
        write_text(f"{self.path}/cgroup.kill", "1")

    def freeze(self, done: Callable[[str], None], *, is_frozen: bool) -> None:
        """Stop all of them, or let them go on; call back when that is so, with an empty text or an error.

        If the kernel cannot stop one, since its file system does not answer, then the others go on.
        """

        def finish(error: str) -> None:
            timer.cancel()
            events.close()
            self.is_frozen = is_frozen and not error
            done(error)

        def on_change(values: dict[str, int]) -> None:
            if values.get("frozen") == is_frozen:
                finish("")
            elif not values.get("populated"):
                finish("its processes have ended")

        def give_up() -> None:
            write_text(f"{self.path}/cgroup.freeze", "0")
            finish(f"its processes did not stop within {_FREEZE_TIMEOUT_S} s")

        self.is_frozen = True
        timer = self._reactor.later(_FREEZE_TIMEOUT_S, give_up)
        events = EventFile(self._reactor, f"{self.path}/cgroup.events", on_change)
        write_text(f"{self.path}/cgroup.freeze", str(int(is_frozen)))


class OomWatch:
    """Notices that the kernel has killed a process of a cgroup for want of memory.

    The kernel may tell some milliseconds late (``cgroup_file_notify``), so whoever sees a process end looks by
    :meth:`check` before it tells anybody: who ran out of memory is then known before who ended.
    """

    def __init__(self, reactor: Reactor, cgroup: Cgroup, on_kill: Callable[[], None]) -> None:
        self._on_kill = on_kill
        self._seen = 0
        self._events = EventFile(reactor, f"{cgroup.path}/memory.events", self._look)

    def check(self) -> None:
        """Look now."""
        self._look(self._events.read())

    def close(self) -> None:
        """Look no more."""
        self._events.close()

    def _look(self, values: dict[str, int]) -> None:
        seen, self._seen = self._seen, max(self._seen, values.get("oom_kill", 0))
        if self._seen > seen:
            self._on_kill()


def read_numbers(text: str) -> dict[str, int]:
    """Return lines of a key and a number as a dict."""
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}
