"""Programs that log the output of a process (``binary://``); nerdctl's log drivers are such.

A logger gets what containerd gives it: fd 3 and 4 to read from, fd 5 to say that it is ready, ``CONTAINER_ID`` and
``CONTAINER_NAMESPACE``, and the query of its name as arguments. It ends by itself when it has read the end of both
streams; if it does not, within the time that containerd gives it, it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from common import log
from common.errors import KataError
from procs.shim import record

if TYPE_CHECKING:
    from procs.shim.outlets import Owner

READY_TIMEOUT_S = 10
END_TIMEOUT_S = 12
_FIRST_FD = 16
"""Our ends are above those that a logger gets, so that none is overwritten before it is copied."""


class Logger:
    """A logger that runs. Whoever started it calls :meth:`finish`; after our death ``delete`` ends it by its record."""

    def __init__(self, name: str, owner: Owner, pid: int) -> None:
        self._name = name
        self._pid = pid
        self._record = record.note_helper(owner.sandbox_id, pid)
        self._has_ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    async def finish(self) -> None:
        """Wait for its end; kill it when that takes too long, or when we are to end ourselves."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._has_ended.wait()
        except TimeoutError:
            log.get().warning("logger killed, it did not end", logger=self._name, seconds=END_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it now, if it has not ended."""
        if not self._has_ended.is_set():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        if not self._has_ended.is_set():
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.waitpid(self._pid, 0)
            os.close(self._pidfd)
            Path(self._record).unlink(missing_ok=True)
            self._has_ended.set()


async def start(name: str, owner: Owner) -> tuple[Logger, int, int]:
    """Start the logger that standard output names; return it when it is ready, and where to write both streams.

    Args:
        name: what standard output is called.
        owner: whose output it is.

    Raises:
        KataError: it did not become ready.
        OSError: it cannot be executed.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        their_stdout, stdout = _pipe(theirs, ours)
        their_stderr, stderr = _pipe(theirs, ours)
        ready, their_ready = _pipe(ours, theirs)
        logger = Logger(name, owner, _spawn(name, owner, (their_stdout, their_stderr, their_ready)))
        ours.callback(logger.kill)
        theirs.close()
        await _wait_ready(name, ready)
        ours.pop_all()
    os.close(ready)
    for fd in (stdout, stderr):
        os.set_blocking(fd, False)
    return logger, stdout, stderr


def _pipe(readers: contextlib.ExitStack, writers: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe; each stack closes one of its ends."""
    ends = []
    for fd, owner in zip(os.pipe2(os.O_CLOEXEC), (readers, writers), strict=True):
        ends.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD))
        os.close(fd)
        owner.callback(os.close, ends[-1])
    return ends[0], ends[1]


def _spawn(name: str, owner: Owner, fds: tuple[int, ...]) -> int:
    """Execute the logger with ``fds`` as 3, 4 and 5; return its pid."""
    parts = urlsplit(name)
    arguments = [part for pair in parse_qsl(parts.query, keep_blank_values=True) for part in pair]
    return os.posix_spawn(
        parts.path,
        [parts.path, *arguments],
        {"CONTAINER_ID": owner.id, "CONTAINER_NAMESPACE": owner.namespace},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            *((os.POSIX_SPAWN_DUP2, 0, fd) for fd in (1, 2)),
            *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds, start=3)),
        ],
        setpgroup=0,
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ],
    )


async def _wait_ready(name: str, fd: int) -> None:
    """Wait until the logger closes its end of the pipe, or writes a byte to it."""
    os.set_blocking(fd, False)
    is_ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, is_ready.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await is_ready.wait()
    except TimeoutError as err:
        raise KataError(f"logger {name} was not ready within {READY_TIMEOUT_S} s") from err
    finally:
        loop.remove_reader(fd)
    if not os.read(fd, 1) and name.startswith("binary-v2:"):
        raise KataError(f"logger {name} ended, or closed its fd 5, before it was ready")
