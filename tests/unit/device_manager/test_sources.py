"""What can be behind a device, and what is said of what cannot."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest

from common.errors import NotFoundError, UsageError
from common.services.vmm import BlockSpec, ShareSpec
from procs.device_manager import sources

if TYPE_CHECKING:
    from pathlib import Path

    from common.services.vmm import DeviceSpec


def examine(spec: DeviceSpec) -> str:
    return asyncio.run(sources.examine(spec))


def image(path: Path, size: int = 512) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_a_source_is_what_it_is_whatever_its_name(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk")
    (tmp_path / "link").symlink_to(disk)
    (tmp_path / "hard").hardlink_to(disk)
    names = {examine(BlockSpec(source=str(tmp_path / name))) for name in ("disk", "link", "hard")}
    assert len(names) == 1
    assert names != {examine(BlockSpec(source=str(image(tmp_path / "other"))))}


def test_a_share_is_a_directory(tmp_path: Path) -> None:
    assert examine(ShareSpec(source=str(tmp_path), tag="t")).startswith("directory ")
    with pytest.raises(UsageError, match="is a file; a share needs a directory"):
        examine(ShareSpec(source=str(image(tmp_path / "file")), tag="t"))


def test_what_is_no_disk_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for source, kind in (
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "socket", "a socket"),
        ("/dev/null", "a character device"),
    ):
        with pytest.raises(UsageError, match=f"is {kind}; a block device needs a disk or a disk image") as refused:
            examine(BlockSpec(source=str(source)))
        assert refused.value.hint


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "missing/below", "loop"):
        with pytest.raises(NotFoundError, match=f"source {tmp_path}/{name} cannot be used: ") as refused:
            examine(BlockSpec(source=str(tmp_path / name)))
        assert refused.value.hint


@pytest.mark.parametrize("source", ["", "disk", "../disk"])
def test_a_path_that_depends_on_a_directory_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="is not an absolute path"):
        examine(BlockSpec(source=source))


def test_an_empty_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a size of zero"):
        examine(BlockSpec(source=str(image(tmp_path / "empty", 0))))
