"""Started as Cloud Hypervisor is, for an API: ``--api-socket fd=N --event-monitor fd=M``.

``--as VERSION`` and ``--closing-takes SECONDS`` are ours.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys

from common.testing.fake_cloud_hypervisor.server import Server

CONTROL_SOCKET = "control"
VERSION = "53.0.0"


async def serve(argv: list[str]) -> None:
    """Answer for ever, on the API's socket and on the control socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-socket", required=True, type=_fd)
    parser.add_argument("--event-monitor", type=_fd, default=-1)
    parser.add_argument("--as", dest="version", default=VERSION)
    parser.add_argument("--closing-takes", type=float, default=0.02)
    arguments, _ = parser.parse_known_args(argv)
    if arguments.event_monitor >= 0:
        os.set_blocking(arguments.event_monitor, False)
    server = Server(arguments.version, arguments.event_monitor, arguments.closing_takes)
    control = await asyncio.start_unix_server(server.control, CONTROL_SOCKET)
    async with control:
        await server.serve(socket.socket(fileno=arguments.api_socket))


def _fd(text: str) -> int:
    return int(text.removeprefix("fd="))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
