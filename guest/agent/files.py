"""Small files, read and written whole; ``io`` and ``os.path`` would do no more."""

from __future__ import annotations

import posix

_CHUNK = 1 << 20


def has_file(path: str) -> bool:
    """Return whether there is a file of this name."""
    try:
        posix.stat(path)
    except FileNotFoundError:
        return False
    return True


def read_text(path: str) -> str:
    """Return a file's text, or nothing if there is no such file."""
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def read_bytes(path: str) -> bytes:
    """Return what is in a file.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        parts = []
        while part := posix.read(descriptor, _CHUNK):
            parts.append(part)
        return b"".join(parts)
    finally:
        posix.close(descriptor)


def write_text(path: str, text: str, *, mode: int = 0o600) -> None:
    """Write a file, or what a file of the kernel takes; ``mode`` is that of a new one.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, mode)
    try:
        data = text.encode()
        while data:
            data = data[posix.write(descriptor, data) :]
    finally:
        posix.close(descriptor)


def make_directories(path: str) -> None:
    """Make a directory and those above it, as far as they are not there."""
    parent = path.rpartition("/")[0]
    if parent:
        make_directories(parent)
    try:
        posix.mkdir(path, 0o755)
    except FileExistsError:
        return


def remove_directory(path: str) -> None:
    """Remove a directory and the files in it, if it is there."""
    try:
        names = posix.listdir(path)
    except FileNotFoundError:
        return
    for name in names:
        posix.unlink(f"{path}/{name}")
    posix.rmdir(path)
