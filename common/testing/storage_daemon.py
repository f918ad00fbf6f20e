"""A program that serves a disk by vhost-user: QEMU's own, of Debian's qemu-system-common."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def serving(image: Path) -> Iterator[Path]:
    """Serve an image; yield the socket beside it, on which the program listens by then."""
    socket, pid = image.with_name("socket"), image.with_name("pid")
    export = "type=vhost-user-blk,id=export,node-name=node,writable=on,addr.type=unix,addr.path="
    subprocess.run(
        [
            *("/usr/bin/qemu-storage-daemon", "--daemonize", "--pidfile", str(pid)),
            *("--blockdev", f"driver=file,node-name=node,filename={image}", "--export", f"{export}{socket}"),
        ],
        check=True,
    )
    program = os.pidfd_open(int(pid.read_text()))
    try:
        yield socket
    finally:
        signal.pidfd_send_signal(program, signal.SIGKILL)
        os.close(program)
