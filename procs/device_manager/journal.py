"""A shard's devices on disk (``database``), written before each step is taken and after it.

::

    devices   one row a device, as it is now; its state is the intent: ``attaching`` is there before the add is asked
    history   what happened to each device; bounded, the oldest of all goes first
    replies   what callers were answered, by call id, for as long as they may ask again

A step and its chapter of history are one transaction. When a journal cannot be read and is begun anew, the devices that
the hypervisors have are shown as ``unknown`` and keep their places.
"""

from __future__ import annotations

import errno
import re
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import msgspec

from common import log, shards
from common.errors import UnavailableError
from common.services.device import Chapter, Device, Story
from procs.device_manager import database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

MAX_CHAPTERS = 20_000
"""Chapters of history that are kept, of all devices together: about 4 MiB."""
MAX_STORY = 1_000
"""Chapters of one device that are told, the latest: a reply has to fit into a bus message."""

_SCHEMA = database.Schema(
    version=2,
    tables=("devices", "history", "replies"),
    statements="""
CREATE TABLE IF NOT EXISTS devices (device_id TEXT PRIMARY KEY, device BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (
    number INTEGER PRIMARY KEY, device_id TEXT NOT NULL, sandbox_id TEXT NOT NULL, chapter BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS story ON history (device_id);
CREATE TABLE IF NOT EXISTS replies (call_id TEXT PRIMARY KEY, expires REAL NOT NULL, reply BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS expiry ON replies (expires);
""",
)


def file_of(service: str) -> Path:
    """Return where a shard's journal is: ``journal.db``, or ``journal.<n>.db`` from the second shard on."""
    return database.directory() / f"journal{service.removeprefix(shards.FIRST)}.db"


def left_by_others(shard: int, of: int) -> list[str]:
    """Return the shards that have a journal and that there are no more of now, as far as they are ours to serve."""
    found = (re.fullmatch(r"journal\.(\d+)\.db", file.name) for file in database.directory().iterdir())
    left = sorted(int(name[1]) for name in found if name)
    return [shards.service_name(number) for number in left if number >= of and number % of == shard]


class Journal:
    """The journal of a shard; a context manager. It belongs to one process at a time, which keeps it locked.

    Args:
        service: the shard's bus name.

    Raises:
        UnavailableError: another process has it, or it cannot be opened.
    """

    def __init__(self, service: str = shards.FIRST) -> None:
        file = file_of(service)
        try:
            self._database, self._devices = _open(file)
        except sqlite3.OperationalError as err:
            raise UnavailableError(
                f"cannot open {file}: {err}",
                hint="stop the device manager that has it, or make room on its file system",
            ) from err
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as err:
            aside = database.move_aside(file)
            log.get().error(
                "journal cannot be read: begun anew, devices are rebuilt from the hypervisors' lists",
                error=str(err),
                kept=str(aside),
            )
            self._database, self._devices = _open(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def load(self) -> list[Device]:
        """Return the devices that were there when the journal was opened, oldest first."""
        return self._devices

    def save(self, device: Device, chapter: Chapter) -> None:
        """Write a device as it is now and what happened to it.

        Raises:
            OSError: that cannot be written, as a rule for want of room; nothing is.
        """
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO devices VALUES (?, ?)", (device.device_id, msgspec.json.encode(device))
            )
            self._tell(device, chapter)

    def remove(self, device: Device, chapter: Chapter) -> None:
        """Forget a device that is gone, but not its history. Raises as :meth:`save` does."""
        with self._transaction():
            self._database.execute("DELETE FROM devices WHERE device_id = ?", (device.device_id,))
            self._tell(device, chapter)

    def story(self, device_id: str) -> Story | None:
        """Return what happened to a device, or None if nothing is known of it."""
        rows = self._database.execute(
            "SELECT sandbox_id, chapter FROM history WHERE device_id = ? ORDER BY number DESC LIMIT ?",
            (device_id, MAX_STORY),
        ).fetchall()
        if not rows:
            return None
        chapters = tuple(msgspec.json.decode(row[1], type=Chapter) for row in reversed(rows))
        return Story(device_id=device_id, sandbox_id=rows[0][0], chapters=chapters)

    def remember(self, call_id: str, reply: bytes, *, seconds: float) -> None:
        """Keep the answer to a call; forget those that nobody may ask for any more. Raises as :meth:`save` does."""
        now = time.time()
        with self._transaction():
            self._database.execute("DELETE FROM replies WHERE expires < ?", (now,))
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (call_id, now + seconds, reply))

    def recall(self, call_id: str) -> bytes | None:
        """Return the answer that a call was given, if it is still kept."""
        row = self._database.execute("SELECT reply FROM replies WHERE call_id = ?", (call_id,)).fetchone()
        return None if row is None else bytes(row[0])

    def _tell(self, device: Device, chapter: Chapter) -> None:
        entry = (device.device_id, device.sandbox_id, msgspec.json.encode(chapter))
        cursor = self._database.execute("INSERT INTO history VALUES (NULL, ?, ?, ?)", entry)
        self._database.execute("DELETE FROM history WHERE number <= ?", ((cursor.lastrowid or 0) - MAX_CHAPTERS,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN")
            yield
            self._database.execute("COMMIT")
        except BaseException as err:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(err, sqlite3.OperationalError):
                raise OSError(errno.ENOSPC, f"the journal cannot be written: {err}") from err
            raise


def _open(file: Path) -> tuple[sqlite3.Connection, list[Device]]:
    """Open the journal and read the devices of this boot.

    Raises:
        sqlite3.Error: see :func:`procs.device_manager.database.connect`.
        msgspec.MsgspecError: a device in it is no device.
    """
    opened = database.connect(file, _SCHEMA)
    try:
        rows = opened.execute("SELECT device FROM devices ORDER BY device_id")
        return opened, [msgspec.json.decode(row[0], type=Device) for row in rows]
    except BaseException:
        opened.close()
        raise
