"""What tests have on the host ends with who runs them, also with one that is killed and gets to clean nothing up.

The runner starts a sweeper, a process in a session of its own, and tells it of each temporary directory. What it starts
bears a mark in its environment, as does what those start. When the runner has ended, however that was, the
sweeper ends what bears the mark, and removes the directories with all that is known by them
(:mod:`common.testing.leaks`). `timeout` tells a whole process group, the services under test too, and the tests then
cannot ask these to clean up.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from common.linux import cgroup, identity
from common.testing.leaks import Footprint

if TYPE_CHECKING:
    from collections.abc import Iterable

_MARK = "PYKATA_TEST_RUNNER"
_ROUNDS = 3
"""How often what bears the mark is looked for: who is being killed may just have started somebody."""


class Sweeper:
    """A running sweeper; from here on this process's children bear the mark."""

    def __init__(self) -> None:
        unmarked = {name: value for name, value in os.environ.items() if name != _MARK}
        mark = secrets.token_hex(8)
        os.environ[_MARK] = mark
        runner = os.pidfd_open(os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, mark, str(runner)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=unmarked,
            pass_fds=[runner],
            start_new_session=True,
        )
        os.close(runner)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def note(self, directory: str) -> None:
        """Tell of a directory, which may not be there yet."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody has killed it
            self._process.stdin.write(os.fsencode(directory) + b"\0")

    def close(self) -> None:
        """Have it sweep, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def sweep(mark: str, directories: Iterable[Path]) -> None:
    """End what bears a mark; remove directories and what is known by them.

    Raises:
        OSError: a process or a mount would not go.
    """
    for _ in range(_ROUNDS):
        marked = [process for process in psutil.process_iter() if _mark_of(process) == mark]
        if not marked:
            break
        groups = _groups({process.pid for process in marked})
        for process in marked:
            with suppress(ProcessLookupError):
                identity.kill(process.pid, identity.start_time(process.pid))
        for name in groups:
            cgroup.kill(name)
    for root in filter(Path.is_dir, directories):
        for run_dir in (root, root / "run"):  # a service's, or a whole stack's
            Footprint(root=root, run_dir=run_dir, address=root / "containerd.sock").remove()
        shutil.rmtree(root)


def _groups(pids: set[int]) -> list[str]:
    """Return the sandboxes whose cgroups some processes are in."""
    with suppress(FileNotFoundError):  # no cgroup2, or nobody has ever had a sandbox
        names = [child.name for child in Path(cgroup.path("")).iterdir() if child.is_dir()]
        return [name for name in names if pids.intersection(cgroup.processes(name))]
    return []


def _mark_of(process: psutil.Process) -> str:
    try:
        return process.environ().get(_MARK, "")
    except psutil.Error:  # it has ended meanwhile
        return ""


def _told(runner: int) -> list[Path]:
    """Return the directories that were told of until the runner had no more to tell."""
    waiter = select.poll()
    waiter.register(sys.stdin.fileno(), select.POLLIN)
    waiter.register(runner, select.POLLIN)
    told = b""
    while sys.stdin.fileno() in dict(waiter.poll()):  # else the runner has ended, and somebody else has the pipe
        piece = os.read(sys.stdin.fileno(), select.PIPE_BUF)
        if not piece:
            break
        told += piece
    return [Path(os.fsdecode(name)) for name in told.split(b"\0") if name]


if __name__ == "__main__":
    sweep(sys.argv[1], _told(int(sys.argv[2])))
