"""Whom ``kata-runtime`` asks: every device manager's shard, over the bus."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from common import paths, shards
from common.bus.client import BusClient
from common.errors import KataError, UnavailableError

if TYPE_CHECKING:
    from common.bus.wire import Verb

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

_TIMEOUT_S = 5.0


async def ask_all(verb: Verb[Q, R], request: Q) -> tuple[list[R], list[KataError]]:
    """Return what the shards answered, and why others did not.

    Raises:
        UnavailableError: there is nobody to ask, which can be seen without asking.
    """
    _require_bus()
    async with BusClient() as bus:
        calls = (bus.call(service, verb, request, timeout_s=_TIMEOUT_S) for service in shards.services())
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    answers: list[R] = []
    failures: list[KataError] = []
    for outcome in outcomes:
        if isinstance(outcome, KataError):
            failures.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers.append(outcome)
    return answers, failures


def _require_bus() -> None:
    directory = Path(paths.bus_dir())
    try:
        os.listdir(directory)  # noqa: PTH208 - the error is what is wanted
    except OSError as err:
        raise UnavailableError(
            f"cannot reach pykata's services in {directory}: {err.strerror}",
            hint=f"start them under supervisord, run as root, or set {paths.RUN_DIR_VARIABLE}",
        ) from err
