"""Processes: the identity that survives pid reuse, and waiting for an end without polling.

A pid alone names nothing: the kernel reuses it. The identity of a process is its pid and its start time within one
boot; it is held as a pidfd wherever it is acted upon.
"""

from __future__ import annotations

import os
from typing import Self

import msgspec

from common.linux import identity


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process that can be recognised later.

    Attributes:
        pid: process id in the host's pid namespace.
        start_time: clock ticks after boot at which it began (proc_pid_stat(5), field 22).
        boot_id: ``/proc/sys/kernel/random/boot_id`` of the boot it belongs to.
    """

    pid: int
    start_time: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the identity of a living process.

        Raises:
            ProcessLookupError: there is no such process.
        """
        return cls(pid=pid, start_time=identity.start_time(pid), boot_id=identity.boot_id())

    def open_pidfd(self) -> int | None:
        """Return a pidfd that the caller closes, or None if the process is gone."""
        if self.boot_id != identity.boot_id():
            return None
        return identity.open_pidfd(self.pid, self.start_time)


async def wait_exit(pidfd: int) -> None:
    """Wait until the process behind a pidfd has ended; closes the pidfd (pidfd_open(2): readable then)."""
    import asyncio  # a shim asks for its VM, which this module describes, before it imports asyncio

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
