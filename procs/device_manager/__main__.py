"""``kata-device-manager``: run under supervisord."""

from __future__ import annotations

import argparse
import functools
import sys
from contextlib import AsyncExitStack

from common.bus import service
from common.bus.client import BusClient
from common.bus.events import Publisher
from common.bus.server import BusServer
from common.config import HYPERVISORS
from common.services.device import SERVICE
from common.workers import Workers
from procs.device_manager.journal import Journal
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
        "--removal-timeout",
        type=float,
        default=REMOVAL_TIMEOUT_S,
        metavar="SECONDS",
        help="how long a guest may take to let a device go (default: %(default)g)",
    )
    arguments = parser.parse_args()
    run = functools.partial(serve, arguments.removal_timeout)
    return service.run("kata-device-manager", run, is_debug=arguments.debug)


async def serve(removal_timeout_s: float) -> None:
    """Take up what is in the journal and answer, for ever. What is entered first is left last."""
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(Journal())
        publisher = await stack.enter_async_context(Publisher(SERVICE))
        bus = await stack.enter_async_context(BusClient())
        workers = await stack.enter_async_context(Workers())
        lives = Lives(Table(journal), bus, publisher, workers, removal_timeout_s=removal_timeout_s)
        measures = Measures(lives)
        server = BusServer(SERVICE, metrics=measures.families, memory=Replies(journal))
        DeviceService(lives, journal, measures, HYPERVISORS).register(server)
        await stack.enter_async_context(server)
        await News(lives, bus, workers).follow(HYPERVISORS)


if __name__ == "__main__":
    sys.exit(main())
