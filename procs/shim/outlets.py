"""Where the output of a process goes. The name of standard output decides what it is.

==================  =================================================================================================
name                what it is
==================  =================================================================================================
a path, `fifo://`   a FIFO that a client reads
`file://`           a file that both streams are appended to
`binary://`         a program that logs: fd 3 is standard output, fd 4 standard error; it closes fd 5 when it is ready
`binary-v2://`      the same, but it must write a byte to fd 5 before
==================  =================================================================================================

Source: containerd v2.3.4 ``pkg/process/io.go`` and ``cmd/containerd-shim-runc-v2/process``; Kata Containers 4.1.0
``shim_io_binary.go``. Nothing here blocks: a client that does not read stops one stream. Output that cannot be written,
since a disk is full or a logger has died, is dropped: the process must not hang for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import log
from common.errors import UsageError
from procs.shim import fifos

if TYPE_CHECKING:
    import socket

    from procs.shim.loggers import Logger
    from procs.shim.tasks import Stdio

_FILE_MODE = 0o640
_PIPE_SIZE = 1 << 20
"""What a pipe may hold that was full once, in bytes: the most that a user may ask for (pipe(7)). The longer who writes
and who reads each are at it, the less it costs."""


class Outlet:
    """One end that output is written to. Owns its descriptor.

    Attributes:
        can_splice: whether bytes of a Unix socket may come here without being read.
    """

    def __init__(self, fd: int, *, can_splice: bool = True) -> None:
        self.can_splice = can_splice
        self._fd = fd
        self._is_grown = False
        self._may_go_on = asyncio.Event()
        self._is_dropping = False

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``, at the pace of whoever reads."""
        left = memoryview(data)
        while left and not self._is_dropping:
            try:
                left = left[await self._write_some(left) :]
            except BlockingIOError:
                await self._wait_writable()
            except OSError as err:
                self._give_up(err)

    async def splice(self, source: socket.socket, size: int) -> int:
        """Move at most ``size`` bytes here from a Unix socket, at the pace of whoever reads; return how many.

        It is none at the socket's end, and when it can be done no longer.

        Raises:
            ConnectionResetError: the VM is gone.
        """
        while self.can_splice:
            try:
                return os.splice(source.fileno(), self._fd, size, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                await (self._wait_writable() if _is_full(self._fd) else _wait_readable(source))
            except ConnectionResetError:
                raise
            except OSError as err:
                self.can_splice = False
                if err.errno != errno.EINVAL:  # not a socket that can be spliced
                    self._give_up(err)
        return 0

    def drop(self) -> None:
        """Drop what is still to be written, now and from now on: nobody reads it."""
        self._is_dropping = True
        self.can_splice = False
        self._may_go_on.set()

    def close(self) -> None:
        """Give it up: its reader sees the end once it has read what is in it."""
        os.close(self._fd)

    async def _write_some(self, data: memoryview) -> int:
        return os.write(self._fd, data)

    def _give_up(self, err: OSError) -> None:
        log.get().error("output dropped, it cannot be written", error=str(err))
        self.drop()

    async def _wait_writable(self) -> None:
        if not self._is_grown:
            self._is_grown = True
            with contextlib.suppress(OSError):  # this user has many pipes, or it is none
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
                return
        loop = asyncio.get_running_loop()
        self._may_go_on.clear()
        loop.add_writer(self._fd, self._may_go_on.set)
        try:
            await self._may_go_on.wait()
        finally:
            loop.remove_writer(self._fd)


class FileOutlet(Outlet):
    """A file: writing waits for the disk, so others are served meanwhile."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, can_splice=False)

    async def _write_some(self, data: memoryview) -> int:
        return await asyncio.to_thread(os.write, self._fd, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose output it is, for those who log it: a container's or exec's id, containerd's namespace, the sandbox."""

    id: str
    namespace: str
    sandbox_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where both streams of a process go; both may go to the same."""

    stdout: Outlet | None = None
    stderr: Outlet | None = None
    logger: Logger | None = None

    def drop(self) -> None:
        """Drop the rest of the output."""
        for outlet in self._each():
            outlet.drop()

    def close(self) -> None:
        """Give both up."""
        for outlet in self._each():
            outlet.close()

    async def finish(self) -> None:
        """After :meth:`close`: give a logger the time to write what it has read."""
        if self.logger is not None:
            await self.logger.finish()

    def _each(self) -> set[Outlet]:
        return {outlet for outlet in (self.stdout, self.stderr) if outlet is not None}


def check(stdio: Stdio) -> None:
    """Refuse output that :func:`open_outlets` cannot open.

    Raises:
        KataError: it is of no kind that there is, or not there.
    """
    scheme, path = _kind(stdio.stdout)
    if scheme not in _OPENERS:
        raise UsageError(f"unknown STDIO scheme {scheme}", hint=f"one of {', '.join(filter(None, _OPENERS))}")
    if scheme == "fifo":
        for fifo in filter(None, (path, _kind(stdio.stderr)[1])):
            fifos.check(fifo)
    elif not path.startswith("/"):
        raise UsageError(f"standard output {stdio.stdout} names no absolute path")


async def open_outlets(stdio: Stdio, owner: Owner) -> Outlets:
    """Open what :func:`check` has let pass; a logger is ready when this returns.

    Raises:
        KataError: it cannot be opened.
    """
    scheme, path = _kind(stdio.stdout)
    try:
        return await _OPENERS[scheme](stdio, path, owner)
    except OSError as err:
        raise UsageError(f"cannot open standard output {stdio.stdout}: {err}") from err


async def _open_fifos(stdio: Stdio, stdout: str, _: Owner) -> Outlets:
    stderr = _kind(stdio.stderr)[1]
    with contextlib.ExitStack() as undo:
        opened: dict[str, Outlet] = {}
        for path in {stdout, stderr} - {""}:
            opened[path] = Outlet(fifos.open_fifo(path, os.O_RDWR))
            undo.callback(opened[path].close)
        undo.pop_all()
    return Outlets(stdout=opened.get(stdout), stderr=opened.get(stderr))


async def _open_file(stdio: Stdio, path: str, _: Owner) -> Outlets:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    outlet = FileOutlet(os.open(path, flags, _FILE_MODE))
    return Outlets(stdout=outlet, stderr=outlet if stdio.stderr else None)


async def _open_logger(stdio: Stdio, _: str, owner: Owner) -> Outlets:
    from procs.shim import loggers

    logger, stdout, stderr = await loggers.start(stdio.stdout, owner)
    return Outlets(stdout=Outlet(stdout), stderr=Outlet(stderr), logger=logger)


_OPENERS = {"fifo": _open_fifos, "file": _open_file, "binary": _open_logger, "binary-v2": _open_logger}


def _is_full(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return not poll.poll(0)


async def _wait_readable(source: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    has_data = asyncio.Event()
    loop.add_reader(source, has_data.set)
    try:
        await has_data.wait()
    finally:
        loop.remove_reader(source)


def _kind(name: str) -> tuple[str, str]:
    """Return what kind of output a name means, and the path in it."""
    scheme, separator, rest = name.partition("://")
    return (scheme, rest.partition("?")[0]) if separator else ("fifo", name)
