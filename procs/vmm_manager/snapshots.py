"""Snapshots of VMs on disk: a directory with what the hypervisor wrote, and ``snapshot.json``, which says what that is.

The file comes last: a directory without it holds no snapshot, whatever else it has.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import msgspec

from common.config import HypervisorConfig
from common.errors import NotFoundError, UsageError

_FILE = "snapshot.json"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is of.

    Attributes:
        version: of the hypervisor that wrote it, and alone can read it.
        config: what the VM was started with.
        directory: where it is; not in the file, since it may be moved.
    """

    version: str
    config: HypervisorConfig
    directory: str = ""

    def save(self) -> None:
        """Write the file, after all else.

        Raises:
            OSError: it cannot be written.
        """
        text = msgspec.json.encode({"version": self.version, "config": self.config})
        with (Path(self.directory) / _FILE).open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def require_empty(directory: str) -> None:
    """Refuse what is no directory to write a snapshot into: one of its own, which nobody else can look into.

    Raises:
        UsageError, NotFoundError: it is none, or has something in it.
    """
    _require_directory(directory)
    if Path(directory).stat().st_mode & _OTHERS:
        raise UsageError(
            f"directory {directory} is open to others than its owner", hint="chmod 700: a guest's memory goes there"
        )
    if any(Path(directory).iterdir()):
        raise UsageError(f"directory {directory} is not empty", hint="a snapshot needs one of its own")


def clear(directory: str) -> None:
    """Remove what was written into a directory that was empty."""
    for file in Path(directory).iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def load(directory: str) -> Snapshot:
    """Return what snapshot is in a directory.

    Raises:
        UsageError, NotFoundError: there is none, or it cannot be read.
    """
    _require_directory(directory)
    try:
        found = msgspec.json.decode((Path(directory) / _FILE).read_bytes(), type=Snapshot)
    except FileNotFoundError as err:
        raise NotFoundError(f"directory {directory} holds no whole snapshot") from err
    except msgspec.MsgspecError as err:
        raise UsageError(f"{directory}/{_FILE} cannot be read: {err}") from err
    return msgspec.structs.replace(found, directory=directory)


def _require_directory(directory: str) -> None:
    if not directory.startswith("/"):
        raise UsageError(f"directory {directory!r} is not an absolute path")
    if not Path(directory).is_dir():
        raise NotFoundError(f"directory {directory} does not exist")
