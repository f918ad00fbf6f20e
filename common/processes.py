"""Processes: the identity that survives pid reuse, and the one place that starts them.

A pid alone names nothing: the kernel reuses it. The identity of a process is its pid and its start time within one
boot; it is held as a pidfd wherever it is acted upon.
"""

from __future__ import annotations

import msgspec


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
