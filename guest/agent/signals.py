"""Signals through ``_signal``: the Python half of ``signal`` makes enums of its numbers, which costs 50 ms of boot."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed describes only `signal`

SIGKILL: int = _signal.SIGKILL
SIGPIPE: int = _signal.SIGPIPE
SIGTERM: int = _signal.SIGTERM
SIGXFSZ: int = _signal.SIGXFSZ


def wake_on_child(descriptor: int) -> None:
    """Have a byte written to a non-blocking descriptor whenever a child has ended."""
    _signal.signal(_signal.SIGCHLD, lambda *_: None)  # without a handler the interpreter would not catch it
    _signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
