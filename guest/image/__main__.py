"""``python -m guest.image --output DIR``: build the guest's kernel and initrd."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import KataError
from guest.image import build


def main() -> int:
    """Build; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m guest.image", description="build the guest's kernel and initrd")
    parser.add_argument("--output", type=Path, required=True, help="directory of the results and of the cache")
    arguments = parser.parse_args()
    try:
        build(arguments.output, lambda line: print(f"guest: {line}", flush=True))  # noqa: T201  # this is the program
    except KataError as err:
        sys.stderr.write(f"guest: {err}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
