"""``kata-device-manager --shard 0/1``: run under supervisord, as many times as there are shards."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from contextlib import AsyncExitStack

from common import log, shards
from common.bus import service
from common.bus.client import BusClient
from common.bus.events import Publisher
from common.bus.server import BusServer
from common.config import HYPERVISORS
from common.errors import UnavailableError
from common.workers import Workers
from procs.device_manager.claims import Claims
from procs.device_manager.journal import Journal, left_by_others
from procs.device_manager.lives import REMOVAL_TIMEOUT_S, Lives
from procs.device_manager.measures import Measures
from procs.device_manager.news import News
from procs.device_manager.replies import Replies
from procs.device_manager.service import DeviceService
from procs.device_manager.table import Table


def main() -> int:
    """Run until a signal; return the exit code."""
    parser = argparse.ArgumentParser(prog="kata-device-manager", description="Owns the devices of pykata's sandboxes.")
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="K/N",
        help=f"be the K-th, from 0, of N that share the sandboxes; new ones are spread over ${shards.VARIABLE}, "
        "which has to be N (default: 0/1)",
    )
    parser.add_argument(
        "--removal-timeout",
        type=float,
        default=REMOVAL_TIMEOUT_S,
        metavar="SECONDS",
        help="how long a guest may take to let a device go (default: %(default)g)",
    )
    arguments = parser.parse_args()
    shard, of = arguments.shard
    run = functools.partial(serve, shard, of, arguments.removal_timeout)
    return service.run("kata-device-manager", run, is_debug=arguments.debug)


def _shard(value: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,2})/([0-9]{1,2})", value)
    if found is None or not int(found[1]) < int(found[2]) <= shards.MAX_SHARDS:
        raise argparse.ArgumentTypeError(f"{value!r} is no K/N with 0 <= K < N <= {shards.MAX_SHARDS}")
    return int(found[1]), int(found[2])


async def serve(shard: int, of: int, removal_timeout_s: float) -> None:
    """Be a shard, for ever; and each that there was when there were more, as long as sandboxes may have it."""
    async with BusClient() as bus, Workers() as others:
        for name in left_by_others(shard, of):
            others.spawn(_serve_too(name, bus, removal_timeout_s))
        await _serve(shards.service_name(shard), bus, removal_timeout_s)


async def _serve_too(name: str, bus: BusClient, removal_timeout_s: float) -> None:
    try:
        await _serve(name, bus, removal_timeout_s)
    except UnavailableError as err:
        log.get().warning("a shard of more is still served by another process", service=name, error=str(err))


async def _serve(name: str, bus: BusClient, removal_timeout_s: float) -> None:
    """Take up what is in a shard's journal and answer, for ever. What is entered first is left last."""
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(Journal(name))
        claims = stack.enter_context(Claims(name))
        publisher = await stack.enter_async_context(Publisher(name))
        workers = await stack.enter_async_context(Workers())
        lives = Lives(Table(journal, claims), bus, publisher, workers, removal_timeout_s=removal_timeout_s)
        measures = Measures(lives)
        server = BusServer(name, metrics=measures.families, memory=Replies(journal))
        DeviceService(lives, journal, measures, HYPERVISORS).register(server)
        await stack.enter_async_context(server)
        await News(name, lives, bus, workers).follow(HYPERVISORS)


if __name__ == "__main__":
    sys.exit(main())
