"""Processes that outlive us, and the sockets that they listen on.

A process of a sandbox runs in a session and cgroup of its own from its first instruction: a shell moves itself into
the cgroup and becomes the program, so that nothing is forked outside. Listening sockets are bound here and inherited:
we may connect before the program runs, and nobody waits for a path to appear.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from common.processes import ProcessIdentity, wait_exit
from procs.vmm_manager.drivers.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PF_EXITING = 0x4
"""``PF_EXITING`` of include/linux/sched.h."""
_ENTER_CGROUP = 'echo 0 > "$0" && exec "$@"'


class Process:
    """A process of a sandbox, started by us or by the manager before us.

    Attributes:
        identity: by which a later manager knows it.
        output: what it prints.
    """

    def __init__(
        self, identity: ProcessIdentity, pidfd: int, output: Output, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.identity = identity
        self.output = output
        self._pidfd = pidfd
        self._child = child
        self._is_killed = False

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        cgroup: str,
        directory: str,
        log: str,
        fds: Sequence[int],
        stdout: int | None = None,
    ) -> Self:
        """Start a program detached from us.

        Args:
            argv: program and arguments.
            cgroup: directory of the cgroup that it runs in.
            directory: its working directory.
            log: the name of its output there.
            fds: descriptors that it inherits, under the same numbers.
            stdout: its standard output, if that does not go into the log.
        """
        output = Output(Path(directory) / log)
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _ENTER_CGROUP, f"{cgroup}/cgroup.procs", *argv],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output.fd if stdout is None else stdout,
                stderr=output.fd,
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError:
            output.close()
            raise
        return cls(ProcessIdentity.of(child.pid), os.pidfd_open(child.pid), output, child)

    @classmethod
    def find(cls, identity: ProcessIdentity, *, directory: str, log: str) -> Self | None:
        """Return the process that an earlier manager started, or None if it has ended."""
        pidfd = identity.open_pidfd()
        if pidfd is None:
            return None
        if _has_ended(pidfd):  # and nobody has reaped it yet
            os.close(pidfd)
            return None
        return cls(identity, pidfd, Output(Path(directory) / log))

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._pidfd >= 0 and not _has_ended(self._pidfd)

    @property
    def is_ending(self) -> bool:
        """Whether it has ended or is about to, whoever killed it: to give its memory back may take it seconds."""
        return self._is_killed or _is_dying(self.identity.pid) or not self.is_running

    async def wait(self) -> None:
        """Wait until it has ended; reap it if it is our child, and close what we held of it."""
        if self._pidfd < 0:
            return
        await wait_exit(os.dup(self._pidfd))
        if self._pidfd >= 0:  # the first of those who wait
            os.close(self._pidfd)
            self._pidfd = -1
            self.output.close()
            if self._child is not None:
                self._child.wait()

    def kill(self) -> None:
        """End it at once; one that has ended is fine."""
        self._is_killed = True
        if self.is_running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it and wait for its end."""
        self.kill()
        await self.wait()


@contextmanager
def listening(directory: str, name: str) -> Iterator[socket.socket]:
    """A Unix socket that listens in a directory of any length; closed on our side at the end, the path stays."""
    with socket.socket(socket.AF_UNIX) as listener, _reachable(directory, name) as path:
        listener.bind(path)
        listener.listen()
        yield listener


def connect(directory: str, name: str) -> socket.socket:
    """Connect to a Unix socket in a directory of any length.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _reachable(directory, name) as path:
            connection.connect(path)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


def _has_ended(pidfd: int) -> bool:
    waiter = select.poll()
    waiter.register(pidfd, select.POLLIN)
    return bool(waiter.poll(0))


def _is_dying(pid: int) -> bool:
    """Return whether a process exits, or will as soon as its first thread runs: a signal that kills is SIGKILL to each.

    proc_pid_stat(5), field 9, and proc_pid_status(5), ``SigPnd``; of another process that has got the pid since, the
    answer means nothing.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    flags = int(stat[stat.rindex(b")") + 2 :].split()[6])
    pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigPnd:"))
    return bool(flags & _PF_EXITING or pending & 1 << (signal.SIGKILL - 1))


@contextmanager
def _reachable(directory: str, name: str) -> Iterator[str]:
    """A short path to a file in a directory: sun_path holds 107 bytes (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
