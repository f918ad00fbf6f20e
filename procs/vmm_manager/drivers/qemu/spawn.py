"""Starting processes that outlive us, and the sockets that they listen on.

A process of a sandbox runs in a session and cgroup of its own from its first instruction: a shell moves itself into
the cgroup and becomes the program, so that nothing is forked outside. Listening sockets are bound here and inherited:
we may connect before the program runs, and nobody waits for a path to appear.
"""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ENTER_CGROUP = 'echo 0 > "$0" && exec "$@"'


def spawn(argv: Sequence[str], *, cgroup: str, directory: str, log: str, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a program detached from us.

    Args:
        argv: program and arguments.
        cgroup: directory of the cgroup that it runs in.
        directory: its working directory.
        log: file in that directory that gets its output.
        fds: descriptors that it inherits, under the same numbers.
    """
    with (Path(directory) / log).open("ab") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", _ENTER_CGROUP, f"{cgroup}/cgroup.procs", *argv],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,
        )


@contextmanager
def listening(directory: str, name: str) -> Iterator[socket.socket]:
    """A Unix socket that listens in a directory of any length; closed on our side at the end, the path stays."""
    with socket.socket(socket.AF_UNIX) as listener, _reachable(directory, name) as path:
        listener.bind(path)
        listener.listen()
        yield listener


def connect(directory: str, name: str) -> socket.socket:
    """Connect to a Unix socket in a directory of any length.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _reachable(directory, name) as path:
            connection.connect(path)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _reachable(directory: str, name: str) -> Iterator[str]:
    """A short path to a file in a directory: sun_path holds 107 bytes (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
