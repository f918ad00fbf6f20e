"""What every service's ``main`` does around its own work: logging, signals, an orderly stop.

A stop closes sockets and nothing else: VMs, their helpers and what is on disk belong to the run directory, where the
next process finds them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

EX_UNAVAILABLE = 69
"""sysexits.h: the service cannot run here, for example since another one does."""


def run(process: str, serve: Callable[[], Awaitable[None]], *, is_debug: bool = False) -> int:
    """Run a service until SIGTERM or SIGINT; return its exit code.

    Args:
        process: its name in logs.
        serve: enters the service's context managers, then waits for ever; it is cancelled to stop.
        is_debug: whether debug records are logged.
    """
    log.configure(process, is_debug=is_debug)
    try:
        asyncio.run(_until_signal(serve))
    except KataError as err:
        log.get().error("cannot run", error=str(err))
        print(f"{process}: {err}", file=sys.stderr)  # noqa: T201 - a person may have started it
        return EX_UNAVAILABLE
    return 0


async def _until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    work = asyncio.current_task()
    if work is None:
        raise RuntimeError("not in a task")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await serve()
    except asyncio.CancelledError:
        log.get().info("stopped by signal")
