"""Which process a pid means: its start time and the boot it belongs to. Standard library only.

The kernel reuses pids. A process is recognised by pid, start time and boot id, and acted upon through a pidfd, which
refers to one process for ever: opened first, compared afterwards, so that nothing can change in between.
"""

from __future__ import annotations

import os
import select

KILL_TIMEOUT_MS = 2000
"""How long a killed process may take to go; longer means that it hangs in the kernel."""


def boot_id() -> str:
    """Return the id that the kernel drew at this boot."""
    with open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123 - `delete` does not import pathlib
        return file.read().strip()


def start_time(pid: int) -> int:
    """Return when a process began, in clock ticks after boot (proc_pid_stat(5), field 22).

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - `delete` does not import pathlib
            stat = file.read()
    except FileNotFoundError as err:
        raise ProcessLookupError(f"no process {pid}") from err
    after_name = stat[stat.rindex(b")") + 2 :]  # the name may contain blanks and parentheses
    return int(after_name.split()[19])


def open_pidfd(pid: int, began: int) -> int | None:
    """Return a pidfd of the process with this pid and start time in this boot, or None if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if start_time(pid) == began:
            return fd
    except ProcessLookupError:
        pass
    os.close(fd)
    return None


def kill(pid: int, began: int) -> None:
    """Kill a process with SIGKILL and wait until it is gone; one that is gone already is fine.

    Raises:
        TimeoutError: it did not go.
    """
    import signal  # makes enums of all its numbers, which takes 5 ms: only those who kill pay for it

    fd = open_pidfd(pid, began)
    if fd is None:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        waiter = select.poll()
        waiter.register(fd, select.POLLIN)
        if not waiter.poll(KILL_TIMEOUT_MS):
            raise TimeoutError(f"process {pid} does not end after SIGKILL")
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
