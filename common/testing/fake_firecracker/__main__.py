"""Started as Firecracker is, after ``--as-version``: which of its versions it is."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

from common.testing.fake_firecracker.machine import Machine
from common.testing.fake_firecracker.server import Server

_PCI_SINCE = (1, 13)
_USAGE = 153
"""``FcExitCode::ArgParsing`` (src/vmm/src/lib.rs)."""
_COUNTERS = {
    "utc_timestamp_ms": 1764012345678,
    "api_server": {"process_startup_time_us": 52000, "sync_response_fails": 0},
    "block_disk_1": {"read_count": 7},
    "vcpu": {"exit_io_in": 3, "exit_io_in_agg": {"min_us": 1, "max_us": 2, "sum_us": 3}},
}


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("as-version", "api-sock", "id", "log-path", "metrics-path", "level", "config-file", "start-time-us"):
        parser.add_argument(f"--{name}", default="")
    for name in ("version", "show-level", "no-api", "enable-pci"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(argv)
    numbers = tuple(map(int, given.as_version.split(".")))
    if given.version:
        print(f"Firecracker v{given.as_version}\n")  # noqa: T201 - as it does
        return 0
    if given.enable_pci and numbers < _PCI_SINCE:
        print(  # noqa: T201 - as it does
            "Arguments parsing error: Found argument 'enable-pci' which wasn't expected, or isn't valid in this "
            "context.\n\nFor more information try --help."
        )
        return _USAGE
    if given.no_api:
        print("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)")  # noqa: T201
        return 0
    log = os.open(given.log_path, os.O_RDWR | os.O_NONBLOCK)  # open for ever: a FIFO keeps its bytes
    machine = Machine(given.id, numbers, has_pci=given.enable_pci, is_jailed=bool(given.start_time_us))

    def write(line: str) -> None:
        os.write(log, f"[{given.id}:fc_api:{line}\n".encode())

    metrics = os.open(given.metrics_path, os.O_RDWR | os.O_NONBLOCK)

    def count(text: str) -> None:
        os.write(metrics, text.encode())

    count(f"{json.dumps(_COUNTERS)}\n")
    asyncio.run(Server(machine, write, count).serve(given.api_sock))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
