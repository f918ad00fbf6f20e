"""Logs: one JSON object a line, with the ids that join them.

Every record carries what is bound in its context: the request that caused it, the sandbox, the container. A service
writes to its standard output, which supervisord collects, the shim to the FIFO that containerd reads; both also to
syslog under upstream's identifier ``kata`` where the host has a ``/dev/log`` (``journalctl -t kata``).
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

IDENTIFIER = "kata"
_SYSLOG_SOCKET = "/dev/log"

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The containerd request (or other cause) that the current task serves; travels on the bus and to the guest."""


def configure(process: str, *, stream: TextIO | None = None, is_debug: bool = False) -> None:
    """Set up logging of this process.

    Args:
        process: its name, in each record as ``source``.
        stream: where lines go; standard output if None.
        is_debug: whether debug records are written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(stream or sys.stdout)]
    if Path(_SYSLOG_SOCKET).is_socket():
        syslog = logging.handlers.SysLogHandler(_SYSLOG_SOCKET)
        syslog.ident = f"{IDENTIFIER}[{os.getpid()}]: "
        handlers.append(syslog)
    logging.basicConfig(
        level=logging.DEBUG if is_debug else logging.INFO, format="%(message)s", handlers=handlers, force=True
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what fails there is our error too
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if is_debug else logging.INFO),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(source=process, pid=os.getpid())


def get() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; it takes its configuration at its first record."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


@contextmanager
def bound(*, request: str = "", **ids: str) -> Iterator[None]:
    """Bind ids to every record written inside, here and in tasks started here.

    Args:
        request: the request id; also becomes :data:`request_id`, which calls carry onward.
        ids: further ids by name, for example ``sandbox`` and ``container``; empty ones are left out.
    """
    token = request_id.set(request) if request else None
    named = {name: value for name, value in {"request": request, **ids}.items() if value}
    try:
        with structlog.contextvars.bound_contextvars(**named):
            yield
    finally:
        if token is not None:
            request_id.reset(token)
