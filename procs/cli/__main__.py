"""``kata-runtime``: one sub-command per module."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import suppress

from common import log
from common.errors import KataError
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


if __name__ == "__main__":
    sys.exit(main())
