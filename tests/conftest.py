"""Each test leaves nothing. Seen is only what this pytest process made, so that tests run side by side.

Processes whose parent has ended become our children, since we are a "child subreaper" (prctl(2)): what a test started
and did not end is found even if it was a daemon. Directories are known by the audit event of ``tempfile.mkdtemp``.
What is there before a test is of a longer life (a session's host) and is left alone.

Of a run that is killed a sweeper removes what there is (:mod:`common.testing.sweeper`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from common.testing import isolation
from common.testing.sweeper import Sweeper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 20.0
"""How long an orphan that is on its way out may take, on a loaded machine."""

_made: list[Path] = []
_SWEEPER = pytest.StashKey[Sweeper]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--containerd", type=Path, help="directory of the containerd under test; default: the host's")


def pytest_configure(config: pytest.Config) -> None:
    sweeper = config.stash[_SWEEPER] = Sweeper()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "tempfile.mkdtemp":
            _made.append(Path(str(arguments[0])))
            sweeper.note(str(arguments[0]))

    sys.addaudithook(note)
    hypothesis.settings.register_profile("any machine", deadline=None)  # no test is about wall time
    hypothesis.settings.load_profile("any machine")
    signal.signal(signal.SIGTERM, _interrupt)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_SWEEPER].close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Be interrupted as by Ctrl-C, and once: `timeout` says it twice, and the second would interrupt the cleaning."""
    signal.signal(number, lambda *_: None)
    signal.default_int_handler(number, frame)


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[set[int]]:
    """Fail the test that leaves a process, a thread or a directory. Yields the processes that do not count."""
    children, threads, made = _children(), set(threading.enumerate()), len(_made)
    yield children
    left = [f"process {command}" for pid in _children() - children if (command := _outlives(pid))]
    left += [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads if not _joins(thread)]
    left += [f"directory {path}" for path in _made[made:] if path.exists()]
    assert left == []


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory of the test's own, which its processes inherit."""
    with isolation.run_dir() as directory:
        yield directory


def _children() -> set[int]:
    """Return our children, by birth or by adoption (proc_pid_task(5): ``children``)."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile has passed its children on
            found.update(map(int, (task / "children").read_text().split()))
    return found


def _outlives(pid: int) -> str:
    """Wait for a child's end, or end it, and reap it; return its command line if it did not end by itself."""
    fd = os.pidfd_open(pid)
    try:
        waiter = select.poll()
        waiter.register(fd, select.POLLIN)
        if waiter.poll(_GRACE_S * 1000):
            return ""
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    finally:
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # whoever started it has reaped it
            os.waitpid(pid, 0)
        os.close(fd)


def _joins(thread: threading.Thread) -> bool:
    thread.join(_GRACE_S)
    return not thread.is_alive()
