"""The devices on disk: SQLite in the run directory, one row a device, written before each step and after it.

The run directory does not outlive the host's boot, nor do VMs: the journal has to survive our process, not the
machine. Hence WAL with ``synchronous=OFF``: a killed process loses nothing that was committed, since the pages are the
kernel's by then (https://www.sqlite.org/pragma.html#pragma_synchronous). A journal of another boot is emptied.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from common import paths
from common.linux import identity
from common.services.device import Device

if TYPE_CHECKING:
    from types import TracebackType

_SCHEMA = """
CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    device_id TEXT PRIMARY KEY, sandbox_id TEXT NOT NULL, state TEXT NOT NULL, device BLOB NOT NULL
) WITHOUT ROWID;
"""


class Journal:
    """The table of devices; a context manager."""

    def __init__(self) -> None:
        directory = Path(paths.run_dir()) / "device-manager"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._database = sqlite3.connect(directory / "journal.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.executescript(_SCHEMA)
        self._begin_boot(identity.boot_id())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def load(self) -> list[Device]:
        """Return every device, oldest first."""
        rows = self._database.execute("SELECT device FROM devices ORDER BY device_id")
        return [msgspec.json.decode(row[0], type=Device) for row in rows]

    def save(self, device: Device) -> None:
        """Write a device as it is now."""
        self._database.execute(
            "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?)",
            (device.device_id, device.sandbox_id, device.state, msgspec.json.encode(device)),
        )

    def remove(self, device_id: str) -> None:
        """Forget a device that is gone."""
        self._database.execute("DELETE FROM devices WHERE device_id = ?", (device_id,))

    def _begin_boot(self, boot_id: str) -> None:
        row = self._database.execute("SELECT id FROM boot").fetchone()
        if row != (boot_id,):
            self._database.execute("DELETE FROM devices")
            self._database.execute("DELETE FROM boot")
            self._database.execute("INSERT INTO boot VALUES (?)", (boot_id,))
