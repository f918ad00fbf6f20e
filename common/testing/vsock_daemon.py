"""A vhost-device-vsock for tests: started as that is, and a client that comes too early is closed as there.

Debian packages none. ``PYKATA_TEST_VSOCK_DAEMON`` names a real one, which then takes this one's place in every test.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from common.testing.vsock_device import GUEST_CID, VsockDevice

REAL = os.environ.get("PYKATA_TEST_VSOCK_DAEMON", "")
NAME = Path(REAL).name if REAL else "common.testing.vsock_daemon"
"""By which its process is found."""


def install(directory: Path) -> str:
    """Return the path of a daemon, for ``vhost_user_vsock_daemon``; ours is put into a directory."""
    if REAL:
        return REAL
    program = directory / "vsock-daemon"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m {NAME} "$@"\n')
    program.chmod(0o700)
    return str(program)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest-cid", type=int, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--uds-path", type=Path, required=True)
    options = parser.parse_args()
    assert options.guest_cid == GUEST_CID
    with VsockDevice(options.socket, options.uds_path, takes_early=False):
        signal.pause()


if __name__ == "__main__":
    main()
