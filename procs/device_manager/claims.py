"""What no two sandboxes of the host may have at once, as claims in one database that all shards share.

A claim is entered before the device's row is, and goes after it: so there is never a device without its claim, and a
process that dies in between leaves a claim too many. That one is a *stray*; the shard that it belongs to drops it when
the hypervisor's list has shown that the device is not there (``lives``). Nobody drops another shard's claims, so one
that is away keeps what its sandboxes have.

A claim is one SQL statement, so no shard can be stopped while it holds the database for longer than that. Who waits
for it all the same waits :data:`_PATIENCE_S` and then answers that it did.

A database that cannot be read is moved aside, as a journal is, if no other shard has it open; the rows that each shard
has are entered again.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from common import log, shards
from common.errors import AlreadyExistsError, UnavailableError
from procs.device_manager import database

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from common.services.device import Device

_PATIENCE_S = 1.0
_RESTART = "`supervisorctl restart device-manager:*`, unless another shard is stopped: ask again then"
_SCHEMA = database.Schema(
    version=1,
    tables=("claims",),
    statements="""
CREATE TABLE IF NOT EXISTS claims (
    device_id TEXT PRIMARY KEY, resource TEXT NOT NULL, is_exclusive INTEGER NOT NULL,
    sandbox_id TEXT NOT NULL, hypervisor TEXT NOT NULL, shard TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS resources ON claims (resource);
""",
)
_ENTER = "INSERT OR REPLACE INTO claims SELECT :device_id, :resource, :is_exclusive, :sandbox_id, :hypervisor, :shard"
_CONFLICT = "resource = :resource AND sandbox_id <> :sandbox_id AND (is_exclusive OR :is_exclusive)"
_TAKE = f"{_ENTER} WHERE NOT EXISTS (SELECT 1 FROM claims WHERE {_CONFLICT})"  # noqa: S608 - constants
_HOLDER = f"SELECT device_id, sandbox_id FROM claims WHERE {_CONFLICT}"  # noqa: S608 - constants


class Claims:
    """A shard's way to the claims; a context manager.

    Args:
        service: the shard's bus name.

    Raises:
        UnavailableError: the database cannot be opened or read.
    """

    def __init__(self, service: str = shards.FIRST) -> None:
        self._service = service
        with ExitStack() as undo:
            self._database = _open(undo)
            self._exit = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def take(self, device: Device) -> None:
        """Claim what a device needs of the host.

        Raises:
            AlreadyExistsError: another sandbox has it, and one of the two wants it alone.
            UnavailableError: another shard does not let go of the database.
        """
        claim = self._claim(device)
        if claim is not None and not self._execute(_TAKE, claim).rowcount:
            raise self._conflict(device, claim)

    def restore(self, devices: Iterable[Device]) -> None:
        """Enter the claims of devices that are there, if they are missing."""
        for claim in map(self._claim, devices):
            if claim is not None:
                self._execute(_ENTER, claim)

    def drop(self, device_id: str) -> None:
        """Give back what a device had; if that cannot be now, the claim is a stray."""
        try:
            self._execute("DELETE FROM claims WHERE device_id = ?", (device_id,))
        except UnavailableError as err:
            log.get().warning("a claim stays for a while", device=device_id, error=str(err))

    def sandboxes(self, hypervisor: str) -> set[str]:
        """Return the sandboxes of this shard that claim something."""
        asked = "SELECT DISTINCT sandbox_id FROM claims WHERE shard = ? AND hypervisor = ?"
        return {row[0] for row in self._execute(asked, (self._service, hypervisor))}

    def drop_strays(self, sandbox_id: str, known: Iterable[Device]) -> None:
        """Give back what a sandbox of this shard claims for devices that it does not have."""
        asked = "SELECT device_id FROM claims WHERE shard = ? AND sandbox_id = ?"
        claimed = {row[0] for row in self._execute(asked, (self._service, sandbox_id))}
        for device_id in claimed - {device.device_id for device in known}:
            log.get().warning("a claim without a device is dropped", device=device_id, sandbox=sandbox_id)
            self.drop(device_id)

    def _claim(self, device: Device) -> dict[str, object] | None:
        """Return a device's claim, of all that its source is a part of; None if it needs none, or nobody knows what."""
        if not device.backing or device.spec is None or not device.spec.is_claimed:
            return None
        return {
            "device_id": device.device_id,
            "resource": device.backing.partition("/")[0],
            "is_exclusive": device.spec.is_exclusive,
            "sandbox_id": device.sandbox_id,
            "hypervisor": device.hypervisor,
            "shard": self._service,
        }

    def _conflict(self, device: Device, claim: dict[str, object]) -> AlreadyExistsError:
        assert device.spec is not None
        device_id, sandbox_id = self._execute(_HOLDER, claim).fetchone() or ("that has just gone", "?")
        return AlreadyExistsError(
            f"{device.spec.source} is held by device {device_id} of sandbox {sandbox_id}",
            hint="two sandboxes may share a disk, if both have it read-only, and nothing else",
        )

    def _execute(self, statement: str, parameters: Mapping[str, object] | Sequence[object]) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, parameters)
        except sqlite3.Error as err:
            is_full = err.sqlite_errorcode == sqlite3.SQLITE_FULL
            raise UnavailableError(
                f"the claims of the host's devices cannot be used: {err}",
                hint=database.MAKE_ROOM if is_full else _RESTART,
            ) from err


def _open(undo: ExitStack) -> sqlite3.Connection:
    """Open the database, as one of those who have it open: the lock beside it tells whether there are others."""
    file = database.directory() / "claims.db"
    lock = os.open(file.with_name("claims.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    undo.callback(os.close, lock)
    is_alone = _try_lock(lock)
    if not is_alone:
        fcntl.flock(lock, fcntl.LOCK_SH)  # whoever opens it for the first time has made it then
    try:
        opened = database.connect(file, _SCHEMA, shared_for_s=_PATIENCE_S)
    except sqlite3.DatabaseError as err:
        if not is_alone or isinstance(err, sqlite3.OperationalError):
            raise UnavailableError(
                f"cannot read {file}: {err}", hint="`supervisorctl restart device-manager:*`: it is made anew"
            ) from err
        log.get().error("claims cannot be read: begun anew", error=str(err), kept=str(database.move_aside(file)))
        opened = database.connect(file, _SCHEMA, shared_for_s=_PATIENCE_S)
    undo.callback(opened.close)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return opened


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
