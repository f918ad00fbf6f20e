"""SQLite in the run directory, for what has to survive our process and not the machine.

Hence WAL with ``synchronous=OFF``: a killed process loses nothing that was committed, since the pages are the kernel's
by then (https://www.sqlite.org/pragma.html#pragma_synchronous). All in it belongs to one boot of the host; what is of
another boot is deleted when it is opened, since no VM outlives the host.

A database that cannot be read is moved aside, not repaired: what the hypervisors say is better than what half a file
says.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from common import paths
from common.linux import identity

MAKE_ROOM = "make room on the file system of the run directory"
"""What helps if a database is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What is in a database; a table ``boot`` comes with it.

    Attributes:
        version: a database of another one counts as one that cannot be read.
        tables: which there are.
        statements: that make them, if they are not there.
    """

    version: int
    tables: tuple[str, ...]
    statements: str


def directory() -> Path:
    """Return the device manager's part of the run directory, and make it."""
    path = Path(paths.run_dir()) / "device-manager"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def connect(file: Path, schema: Schema, *, shared_for_s: float = 0.0) -> sqlite3.Connection:
    """Open a database and make what is missing.

    Args:
        file: where it is.
        schema: what is in it.
        shared_for_s: how long to wait for other processes that use it; 0 if it is to be ours alone.

    Raises:
        sqlite3.OperationalError: it is locked, or cannot be opened.
        sqlite3.DatabaseError: it is damaged, or of another release.
    """
    database = sqlite3.connect(file, isolation_level=None, timeout=shared_for_s)
    try:
        if not shared_for_s:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        _check(database, schema.version)
        boot = "CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL);"
        database.executescript(f"{boot} {schema.statements} PRAGMA user_version = {schema.version};")
        _begin_boot(database, schema, identity.boot_id())
    except BaseException:
        database.close()
        raise
    return database


def move_aside(file: Path) -> Path:
    """Rename a damaged database and what SQLite keeps beside it; the last damaged one is kept."""
    aside = file.with_name(f"{file.name}.damaged")
    for suffix in ("", "-wal", "-shm"):
        with_suffix = file.with_name(file.name + suffix)
        if with_suffix.exists():
            with_suffix.replace(aside.with_name(aside.name + suffix))
    return aside


def _check(database: sqlite3.Connection, expected: int) -> None:
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(" ".join(verdict.split()))
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and version != expected:
        raise sqlite3.DatabaseError(f"its schema is {version}, this release has {expected}")


def _begin_boot(database: sqlite3.Connection, schema: Schema, boot_id: str) -> None:
    if database.execute("SELECT id FROM boot").fetchone() != (boot_id,):
        for table in ("boot", *schema.tables):
            database.execute(f"DELETE FROM {table}")  # noqa: S608 - a constant
        database.execute("INSERT INTO boot VALUES (?)", (boot_id,))
