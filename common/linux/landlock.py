"""Whether this kernel lets a process give up access to files for good: Landlock (landlock(7))."""

from __future__ import annotations

import ctypes

_SYS_LANDLOCK_CREATE_RULESET = 444
"""The same number on every architecture that we run on."""
_CREATE_RULESET_VERSION = 1
"""``LANDLOCK_CREATE_RULESET_VERSION`` of <linux/landlock.h>."""


def abi() -> int:
    """Return which of its interfaces the kernel has, from 1; 0 if it has none, or it was not enabled at the boot."""
    libc = ctypes.CDLL(None)
    return max(int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)), 0)
