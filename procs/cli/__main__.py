"""``kata-runtime``: one sub-command per module."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from common import log, paths
from common.errors import KataError, UnavailableError
from procs.cli import devices

COMMANDS = (devices,)


def main() -> int:
    """Run one command; return the exit code."""
    parser = argparse.ArgumentParser(prog="kata-runtime", description="Looks into pykata's sandboxes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args()
    log.configure("kata-runtime", stream=sys.stderr)
    try:
        _require_bus()
        asyncio.run(arguments.run(arguments))
        sys.stdout.flush()
    except KataError as err:
        print(f"kata-runtime: {err}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has seen enough, for example `head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _require_bus() -> None:
    """Say why there is nobody to ask, if that can be seen without asking.

    Raises:
        UnavailableError: the services' directory is not there or not ours to enter.
    """
    directory = Path(paths.bus_dir())
    try:
        os.listdir(directory)  # noqa: PTH208 - the error is what is wanted
    except OSError as err:
        raise UnavailableError(
            f"cannot reach pykata's services in {directory}: {err.strerror}",
            hint=f"start them under supervisord, run as root, or set {paths.RUN_DIR_VARIABLE}",
        ) from err


if __name__ == "__main__":
    sys.exit(main())
