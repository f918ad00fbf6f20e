"""Who serves a sandbox: a lock and ``shim.json``, both of the sandbox's directory. Standard library only.

The shim that serves a sandbox holds an exclusive ``flock`` on the sandbox's directory from before it exists (``start``
takes it, the forked server inherits it) until its death, whatever kills it. So "is it served?" is a question to the
kernel, not to a pid. ``shim.json`` says by whom::

    {"pid": 4242, "start_time": 81231, "boot_id": "0f0c…",
     "namespace": "default", "bundle": "/run/…", "socket": "/run/…"}

``helpers/<pid>`` holds the start time of a child of the shim, a logger, that is to end with the sandbox.

Taking a name (look, clean up what a dead shim left, make the directory, lock it) is one step for everybody else: it
happens under a lock on the directory of all sandboxes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from _json import encode_basestring_ascii as _quote  # json itself costs 10 ms: as much as starting Python

from common import paths
from common.linux.identity import boot_id, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "shim.json"
_HELPERS = "helpers"


@contextlib.contextmanager
def names_locked() -> Iterator[None]:
    """Keep everybody else from taking or giving up a sandbox's name. Makes the directory of all sandboxes."""
    os.makedirs(paths.sandboxes_dir(), mode=0o700, exist_ok=True)
    fd = os.open(paths.sandboxes_dir(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def take(sandbox_id: str) -> int:
    """Make the sandbox's directory and lock it; return the descriptor that holds the lock.

    Raises:
        FileExistsError: the directory exists.
    """
    os.mkdir(paths.sandbox_dir(sandbox_id), 0o700)
    fd = os.open(paths.sandbox_dir(sandbox_id), os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def is_served(sandbox_id: str) -> bool:
    """Return whether a living shim holds the sandbox."""
    try:
        fd = os.open(paths.sandbox_dir(sandbox_id), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def write(sandbox_id: str, *, namespace: str, bundle: str, socket: str) -> None:
    """Record the calling process as the sandbox's shim; readers see the whole file or none.

    Nothing is synced: the directory is of this boot and on a tmpfs, and a reboot ends every sandbox.
    """
    pid = os.getpid()
    strings = {"boot_id": boot_id(), "namespace": namespace, "bundle": bundle, "socket": socket}
    fields = "".join(f', "{name}": {_quote(value)}' for name, value in strings.items())
    path = f"{paths.sandbox_dir(sandbox_id)}/{FILE}"
    with open(f"{path}.new", "w") as file:
        file.write(f'{{"pid": {pid}, "start_time": {start_time(pid)}{fields}}}\n')
    os.rename(f"{path}.new", path)


def note_helper(sandbox_id: str, pid: int) -> str:
    """Record a child of the calling shim that is to end with the sandbox; return the file that says so."""
    directory = f"{paths.sandbox_dir(sandbox_id)}/{_HELPERS}"
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = f"{directory}/{pid}"
    with open(path, "w") as file:
        file.write(str(start_time(pid)))
    return path


def helpers(sandbox_id: str) -> list[tuple[int, int]]:
    """Return pid and start time of each child that was recorded and has not ended in order."""
    directory = f"{paths.sandbox_dir(sandbox_id)}/{_HELPERS}"
    if not os.path.lexists(directory):
        return []
    found = []
    for name in os.listdir(directory):
        with open(f"{directory}/{name}") as file:
            found.append((int(name), int(file.read() or 0)))
    return found


def read(sandbox_id: str) -> dict[str, str | int] | None:
    """Return what ``shim.json`` says, or None if there is none."""
    import json

    try:
        with open(f"{paths.sandbox_dir(sandbox_id)}/{FILE}") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None
