"""``kata-device-manager``: run under supervisord."""

from __future__ import annotations

import argparse
import sys

from common.bus import service
from common.bus.client import BusClient
from common.bus.server import BusServer
from common.services.device import SERVICE
from common.workers import Workers
from procs.device_manager.journal import Journal
from procs.device_manager.manager import DeviceManager

HYPERVISORS = ("qemu",)


def main() -> int:
    """Run until a signal; return the exit code."""
    parser = argparse.ArgumentParser(prog="kata-device-manager", description="Owns the devices of pykata's sandboxes.")
    parser.add_argument("--debug", action="store_true", help="log more")
    arguments = parser.parse_args()

    async def serve() -> None:
        server = BusServer(SERVICE, gauges=lambda: manager.gauges())  # noqa: PLW0108 - made once the lock is held
        async with server, BusClient() as bus, Workers() as workers:
            with Journal() as journal:
                manager = DeviceManager(journal, bus, workers)
                manager.register(server)
                await manager.follow(HYPERVISORS)

    return service.run("kata-device-manager", serve, is_debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
