"""Connecting to Unix sockets whose path may be longer than the 107 bytes of an address (unix(7))."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from common.errors import UnavailableError


def connect(path: str) -> socket.socket:
    """Return a non-blocking socket that is connected to ``path``.

    The directory is reached through ``/proc/self/fd``, so only its last part counts against the limit.

    Raises:
        UnavailableError: nobody listens there.
    """
    place = Path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            sock.connect(f"/proc/self/fd/{directory}/{place.name}")
        finally:
            os.close(directory)
    except OSError as err:
        sock.close()
        raise UnavailableError(f"cannot connect to {path}: {err.strerror}") from err
    sock.setblocking(False)
    return sock
