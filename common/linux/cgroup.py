"""The cgroup of a sandbox's processes: ``pykata/<sandbox id>`` in the cgroup2 hierarchy. Standard library only.

It is used for one thing: to end all processes of a sandbox, also those that somebody forked and nobody recorded.
``cgroup.kill`` does that atomically and exists in cgroup2 only, which hosts with cgroup v1 controllers mount beside
them. Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import select
import time

KILL_TIMEOUT_S = 10.0
"""How long killed processes may take to go; longer means that one hangs in the kernel."""

_PARENT = "pykata"


def mount_point() -> str:
    """Return where the cgroup2 hierarchy is mounted (proc_pid_mountinfo(5)).

    Raises:
        FileNotFoundError: it is not mounted.
    """
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return left.split()[4]
    raise FileNotFoundError("the cgroup2 hierarchy is not mounted; `mount -t cgroup2 cgroup2 /sys/fs/cgroup`")


def path(sandbox_id: str) -> str:
    """Return the directory of a sandbox's cgroup, whether it exists or not."""
    return f"{mount_point()}/{_PARENT}/{sandbox_id}"


def create(sandbox_id: str) -> str:
    """Make a sandbox's cgroup and return its directory; one that exists is fine."""
    directory = path(sandbox_id)
    os.makedirs(directory, exist_ok=True)
    return directory


def processes(sandbox_id: str) -> list[int]:
    """Return the pids in a sandbox's cgroup; none if there is no such cgroup."""
    try:
        with open(f"{path(sandbox_id)}/cgroup.procs") as file:
            return [int(line) for line in file]
    except OSError:
        return []


def kill(sandbox_id: str) -> None:
    """Kill all processes of a sandbox, wait until they are gone, remove the cgroup; a missing one is fine.

    The shim, its `delete` and the VM manager may do so at once: what one of them has removed is gone for all.

    Raises:
        TimeoutError: a process does not end.
    """
    directory = path(sandbox_id)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    try:
        while not _kill_and_remove(directory, deadline):
            pass
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: removed while one of its files is open
            raise


def _kill_and_remove(directory: str, deadline: float) -> bool:
    """Return whether the cgroup is gone: it is not if a process that was just started entered it after the kill."""
    with open(f"{directory}/cgroup.kill", "w") as file:
        file.write("1")
    _wait_empty(directory, deadline)
    try:
        os.rmdir(directory)
    except OSError as err:
        if err.errno != errno.EBUSY or time.monotonic() > deadline:
            raise
        return False
    return True


def _wait_empty(directory: str, deadline: float) -> None:
    """Wait for ``populated 0``; the kernel signals a change of cgroup.events by POLLPRI."""
    fd = os.open(f"{directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        waiter = select.poll()
        waiter.register(fd, select.POLLPRI)
        while b"populated 0" not in os.pread(fd, 256, 0):
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not waiter.poll(left_ms):
                raise TimeoutError(f"a process in {directory} does not end after SIGKILL")
    finally:
        os.close(fd)
