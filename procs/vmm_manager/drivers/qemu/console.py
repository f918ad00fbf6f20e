"""The guest's console: the last 64 KiB of what it printed.

QEMU keeps it in a ring buffer that reading empties; what was read is kept here and in ``console.log``, so that it can
be shown again, also after QEMU's end. The file never grows beyond the buffer's size.
"""

from __future__ import annotations

import base64
from contextlib import suppress
from typing import TYPE_CHECKING

from common.errors import KataError
from procs.vmm_manager.drivers.output import readable
from procs.vmm_manager.drivers.qemu.cmdline import CONSOLE, CONSOLE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from procs.vmm_manager.drivers.qemu.qmp import Qmp


class Console:
    """What one guest printed."""

    def __init__(self, file: Path, qmp: Qmp) -> None:
        self._file = file
        self._qmp = qmp
        self._kept = file.read_bytes()[-CONSOLE_SIZE:] if file.exists() else b""

    async def tail(self) -> str:
        """Return the last of it, with what is new in QEMU; when QEMU is gone, what was read before."""
        with suppress(KataError):
            text = await self._qmp.execute("ringbuf-read", device=CONSOLE, size=CONSOLE_SIZE, format="base64")
            if text:
                self._kept = (self._kept + base64.b64decode(text))[-CONSOLE_SIZE:]
                with suppress(FileNotFoundError):  # the sandbox was cleaned up
                    self._file.write_bytes(self._kept)
        return readable(self._kept)
