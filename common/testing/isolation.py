"""What lets tests of real processes run side by side: a run directory and an event loop of their own."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from common import paths

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

P = ParamSpec("P")

_TEST_TIMEOUT_S = float(os.environ.get("PYKATA_TEST_TIMEOUT_S") or 150)


def in_event_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run a test that is a coroutine, with a limit that is not a measure of anything."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), _TEST_TIMEOUT_S))

    return run


@contextmanager
def run_dir() -> Iterator[Path]:
    """Give this process and its children a run directory of their own, with a path short enough for sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="kt-", dir="/tmp") as directory,
        variable(paths.RUN_DIR_VARIABLE, directory),
    ):
        yield Path(directory)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of our own environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
