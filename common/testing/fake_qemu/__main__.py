"""Started as QEMU is: the monitor is the listening socket that ``-chardev socket,id=qmp,fd=N`` names."""

from __future__ import annotations

import asyncio
import re
import socket
import sys

from common.testing.fake_qemu.machine import buses_of
from common.testing.fake_qemu.monitor import Monitor

CONTROL_SOCKET = "control"
UNDRIVEN = "--undriven"
"""An argument: the guest has no driver for its vsock device until it is told (``x-drive``)."""


async def serve(argv: list[str]) -> None:
    """Answer for ever, on the monitor and on the control socket."""
    monitor = Monitor(buses_of(argv), is_driven=UNDRIVEN not in argv)
    found = re.search(r"socket,id=qmp,fd=(\d+)", " ".join(argv))
    if found is None:
        raise SystemExit("no monitor: -chardev socket,id=qmp,fd=N is missing")
    listener = socket.socket(fileno=int(found[1]))
    control = await asyncio.start_unix_server(monitor.serve, CONTROL_SOCKET)
    async with control, await asyncio.start_unix_server(monitor.serve, sock=listener):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
