"""A file of ours in the mounts of a process that has its own."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.linux import mount_namespace, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def apart() -> Iterator[int]:
    """A process with mounts of its own; yields its pid."""
    command = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", "echo; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has them now
        yield process.pid
        process.kill()


def test_it_is_seen_there_and_only_there_until_it_is_taken_back(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("ours")
    target.touch()
    with apart() as pid:
        theirs = tmp_path.joinpath(f"/proc/{pid}/root{target}")
        assert not mount_namespace.is_shared_with(pid)
        mount_namespace.bind_into(pid, str(source), str(target), mounts.MS_RDONLY)
        assert (theirs.read_text(), target.read_text()) == ("ours", "")
        with pytest.raises(OSError, match="Read-only file system"):
            theirs.write_text("theirs")
        mount_namespace.unmount_in(pid, str(target))
        mount_namespace.unmount_in(pid, str(target))
        assert theirs.read_text() == ""
    mount_namespace.unmount_in(pid, str(target))


def test_what_cannot_be_is_said_in_the_kernels_words(tmp_path: Path) -> None:
    with apart() as pid, pytest.raises(OSError, match="No such file or directory"):
        mount_namespace.bind_into(pid, str(tmp_path / "missing"), str(tmp_path))


def test_a_process_of_ours_has_our_mounts() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        assert mount_namespace.is_shared_with(process.pid)
        process.kill()
