"""The devices on disk: SQLite in the run directory, written before each step is taken and after it.

::

    boot      the boot that all this belongs to; a journal of another boot is emptied, since no VM outlives the host
    devices   one row a device, as it is now; its state is the intent: ``attaching`` is there before the add is asked
    history   what happened to each device; bounded, the oldest of all goes first
    replies   what callers were answered, by call id, for as long as they may ask again

A step and its chapter of history are one transaction. The journal has to survive our process, not the machine: hence
WAL with ``synchronous=OFF``. A killed process loses nothing that was committed, since the pages are the kernel's by
then (https://www.sqlite.org/pragma.html#pragma_synchronous).

A journal that cannot be read is moved aside, not repaired: what the hypervisors say is better than what half a file
says. Their devices are then shown as ``unknown`` and keep their places.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from common import log, paths
from common.errors import UnavailableError
from common.linux import identity
from common.services.device import Chapter, Device, Story

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

MAX_CHAPTERS = 20_000
"""Chapters of history that are kept, of all devices together: about 4 MiB."""
MAX_STORY = 1_000
"""Chapters of one device that are told, the latest: a reply has to fit into a bus message."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (device_id TEXT PRIMARY KEY, device BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (
    number INTEGER PRIMARY KEY, device_id TEXT NOT NULL, sandbox_id TEXT NOT NULL, chapter BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS story ON history (device_id);
CREATE TABLE IF NOT EXISTS replies (call_id TEXT PRIMARY KEY, expires REAL NOT NULL, reply BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS expiry ON replies (expires);
"""
_VERSION = 2
"""Of the schema; a journal of another release counts as one that cannot be read."""
_TABLES = ("boot", "devices", "history", "replies")


class Journal:
    """The journal; a context manager. It belongs to one process at a time, which keeps it locked.

    Raises:
        UnavailableError: another process has it, or it cannot be opened.
    """

    def __init__(self) -> None:
        directory = Path(paths.run_dir()) / "device-manager"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = directory / "journal.db"
        try:
            self._database, self._devices = _open(file)
        except sqlite3.OperationalError as err:
            raise UnavailableError(
                f"cannot open {file}: {err}",
                hint="stop the device manager that has it, or make room on its file system",
            ) from err
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as err:
            aside = _move_aside(file)
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
        """Write a device as it is now and what happened to it."""
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO devices VALUES (?, ?)", (device.device_id, msgspec.json.encode(device))
            )
            self._tell(device, chapter)

    def remove(self, device: Device, chapter: Chapter) -> None:
        """Forget a device that is gone, but not its history."""
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
        """Keep the answer to a call; forget those that nobody may ask for any more."""
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
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _open(file: Path) -> tuple[sqlite3.Connection, list[Device]]:
    """Open the database and read the devices of this boot.

    Raises:
        sqlite3.OperationalError: it is locked, or cannot be opened.
        sqlite3.DatabaseError: it is damaged, or of another release.
        msgspec.MsgspecError: a device in it is no device.
    """
    database = sqlite3.connect(file, isolation_level=None, timeout=0)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        _check(database)
        database.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
        _begin_boot(database, identity.boot_id())
        rows = database.execute("SELECT device FROM devices ORDER BY device_id")
        return database, [msgspec.json.decode(row[0], type=Device) for row in rows]
    except BaseException:
        database.close()
        raise


def _check(database: sqlite3.Connection) -> None:
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and version != _VERSION:
        raise sqlite3.DatabaseError(f"its schema is {version}, this release has {_VERSION}")


def _begin_boot(database: sqlite3.Connection, boot_id: str) -> None:
    if database.execute("SELECT id FROM boot").fetchone() != (boot_id,):
        for table in _TABLES:
            database.execute(f"DELETE FROM {table}")  # noqa: S608 - a constant
        database.execute("INSERT INTO boot VALUES (?)", (boot_id,))


def _move_aside(file: Path) -> Path:
    """Rename a damaged database and what SQLite keeps beside it; the last damaged one is kept."""
    aside = file.with_name(f"{file.name}.damaged")
    for suffix in ("", "-wal", "-shm"):
        with_suffix = file.with_name(file.name + suffix)
        if with_suffix.exists():
            with_suffix.replace(aside.with_name(aside.name + suffix))
    return aside
