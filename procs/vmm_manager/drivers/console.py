"""A guest's console that is a VMM's standard output: the last 64 KiB of what it printed.

Like all output it is a FIFO that never blocks its writer (``output``), but of a guest the last words count, so it is
emptied as it fills. What was read is kept here and in ``console.log`` when somebody asks, so that it can be shown
again, also after the VM's end and by a manager that starts again. The file never grows beyond what is kept.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from procs.vmm_manager.drivers.output import readable

FIFO = "console"
LOG = "console.log"
SIZE = 64 << 10


class Console:
    """What one guest printed.

    Attributes:
        fd: to be the VMM's standard output.
    """

    def __init__(self, directory: str) -> None:
        path = Path(directory, FIFO)
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file = Path(directory, LOG)
        self._kept = self._file.read_bytes()[-SIZE:] if self._file.exists() else b""
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def tail(self) -> str:
        """Return the last of it."""
        if self.fd >= 0:
            self._read()
            with suppress(FileNotFoundError):  # the sandbox was cleaned up
                self._file.write_bytes(self._kept)
        return readable(self._kept)

    def close(self) -> None:
        """Stop listening; what was printed is still known."""
        if self.fd >= 0:
            self.tail()
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self._kept = (self._kept + os.read(self.fd, SIZE))[-SIZE:]
