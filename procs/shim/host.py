"""``kata-shim-host``: forks shims from a process that has imported everything; run under supervisord.

A shim that ``start`` forks imports for as long as QEMU takes to start before it can ask for its VM, goes on importing
while the guest boots, and holds all of it in memory of its own. A shim that is forked from here has it, and shares it.

The host is an accelerator and nothing else: ``start`` forks by itself whenever the host is not there, does not answer
or declines (:mod:`procs.shim.launch` shows the agreement). What it has forked does not know it any more.

- Before a fork there is one thread, no event loop, no ZeroMQ context, and no descriptor but the socket, the lock and
  the standard streams. Nothing that a caller says is read before the fork: what is wrong with it ends the fork.
- The fork becomes what the caller's own fork would have been (:mod:`procs.shim.host_caller`), or it declines.
- Code that was replaced is not forked: before each fork the host looks whether a file of ours that it has loaded has
  changed since, and if so ends, for supervisord to start the new one. Libraries are as they were when it started.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gc
import json
import os
import pkgutil
import socket
import struct
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import procs.shim
from common import log, paths
from procs.shim import host_caller, launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

MAX_MESSAGE = 128 << 10
"""A longer environment is declined. The kernel's limit for one message is 208 KiB."""

_NAME = "kata-shim-host"
_BACKLOG = 128
_MODULES = ("concurrent.futures.thread", "ctypes")
"""What shims import late, beside the modules of their own package."""


def main() -> int:
    """Run until a signal, or until what was loaded is out of date; return the exit code."""
    parser = argparse.ArgumentParser(prog=_NAME, description="Forks the shims of pykata's sandboxes.")
    parser.parse_args([argument for argument in sys.argv[1:] if argument])
    if sys.argv[-1]:
        os.execv(sys.executable, [*sys.orig_argv, *[""] * host_caller.MAX_COMMAND_LINE])  # noqa: S606 - ourselves
    Path("/proc/self/comm").write_text(_NAME)
    for module in (*_MODULES, *(f"procs.shim.{found.name}" for found in pkgutil.iter_modules(procs.shim.__path__))):
        import_module(module)
    loaded = _stamps()
    gc.collect()
    gc.freeze()  # the collector writes into what it looks at, and what is written is not shared
    os.umask(0o077)
    with _locked(paths.run_dir()) as lock, _listen(paths.shim_host_socket()) as listener:
        print(json.dumps({"event": "listening", "source": _NAME, "pid": os.getpid()}), flush=True)  # noqa: T201 - the log
        while True:
            connection, _ = listener.accept()
            with connection:
                if _stamps() != loaded:
                    return 0
                launch.detach(functools.partial(_become_shim, connection, listener, lock))


def _become_shim(connection: socket.socket, listener: socket.socket, lock: BinaryIO) -> int:
    """Agree with the caller, in the forked process, and serve; return the exit status."""
    listener.close()
    lock.close()
    connection.settimeout(launch.HOST_TIMEOUT_S)
    try:
        given = _take_over(connection)
        connection.send(launch.READY)
        _, fds, _, _ = socket.recv_fds(connection, len(launch.READY), 2, socket.MSG_CMSG_CLOEXEC)
        served, _lock = fds
    except (OSError, ValueError) as err:
        log.configure(_NAME)
        log.get().warning("declined, the caller forks by itself", error=str(err))
        return 1
    connection.setblocking(True)
    return launch.become_server(given, socket.socket(fileno=served), connection.detach())


def _take_over(connection: socket.socket) -> launch.Launch:
    """Read what the caller says and take over what it has.

    Raises:
        OSError: something cannot be taken over.
        ValueError: the message is not one of a ``start`` of this code and user.
    """
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", peer)
    if uid != os.geteuid():
        raise PermissionError(f"the caller is user {uid}")
    data, _, flags, _ = connection.recvmsg(MAX_MESSAGE)
    if flags & socket.MSG_TRUNC:
        raise ValueError(f"the message exceeds {MAX_MESSAGE} bytes")
    given, environment = launch.Launch.decode(data)
    host_caller.take_over(pid)
    os.environ.clear()
    os.environb.update(environment)
    return given


@contextmanager
def _locked(directory: str) -> Iterator[BinaryIO]:
    """Keep other hosts from listening; wait for the end of one that does: its supervisord may have died before it."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with Path(directory, "shim-host.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _listen(path: str) -> socket.socket:
    """Return the listener, for nobody but our own user."""
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(_BACKLOG)
    return listener


def _stamps() -> list[tuple[int, int]]:
    """Return what tells whether the files that our own modules were loaded from are still the same."""
    ours = (module for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("procs", "common"))
    return [_stamp(module.__file__ or "") for module in ours]


def _stamp(file: str) -> tuple[int, int]:
    try:
        found = os.stat(file)  # noqa: PTH116 - many of them before each fork
    except OSError:
        return 0, 0
    return found.st_ino, found.st_ctime_ns


if __name__ == "__main__":
    sys.exit(main())
