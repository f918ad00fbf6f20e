"""``kata-monitor``: run under supervisord, scraped by Prometheus."""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys

from common import log
from common.bus import service
from common.bus.client import BusClient
from common.errors import UnavailableError
from procs.monitor.http import serve
from procs.monitor.observation import observe


def main() -> int:
    """Run until a signal; return the exit code."""
    parser = argparse.ArgumentParser(prog="kata-monitor", description="Serves metrics of pykata's sandboxes.")
    parser.add_argument("--listen-address", default="127.0.0.1:8090", help="host:port (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="log more")
    arguments = parser.parse_args()

    async def run() -> None:
        async with BusClient() as bus:
            look = functools.partial(observe, bus)
            loop = asyncio.get_running_loop()
            try:
                server = serve(arguments.listen_address, look, loop)
            except OSError as err:
                raise UnavailableError(f"cannot listen on {arguments.listen_address}: {err}") from err
            with server:
                log.get().info("listening", address=f"{server.server_name}:{server.server_port}")
                loop.add_reader(server.fileno(), server.handle_request)
                try:
                    await asyncio.Event().wait()
                finally:
                    loop.remove_reader(server.fileno())

    return service.run("kata-monitor", run, is_debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
