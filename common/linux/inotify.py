"""Waiting until a file appears in a directory, told by the kernel: inotify(7). Python has no wrapper."""

from __future__ import annotations

import asyncio
import ctypes
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IN_CREATE = 0x100
_IN_MOVED_TO = 0x80
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_BUFFER = 4096
"""Bytes of events that are read at once; one has 16 and a name of at most 255 (inotify(7))."""


class Directory:
    """A directory whose new files are told.

    Attributes:
        path: of the directory.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    async def wait_for(self, name: str) -> None:
        """Wait until there is a file of this name; one that was there before counts."""
        loop = asyncio.get_running_loop()
        while not (self.path / name).exists():
            news = asyncio.Event()
            loop.add_reader(self._fd, news.set)
            try:
                await news.wait()
            finally:
                loop.remove_reader(self._fd)
            with suppress(BlockingIOError):
                os.read(self._fd, _BUFFER)


@contextmanager
def watching(path: Path) -> Iterator[Directory]:
    """Watch a directory from here on.

    Raises:
        OSError: there is none, or the host's limit of watches is reached (``fs.inotify.max_user_instances``).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = _checked(libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC), path)
    try:
        _checked(libc.inotify_add_watch(fd, os.fsencode(path), _IN_CREATE | _IN_MOVED_TO), path)
        yield Directory(path, fd)
    finally:
        os.close(fd)


def _checked(result: int, path: Path) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))
    return result
