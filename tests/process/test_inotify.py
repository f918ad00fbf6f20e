"""Waiting for a file: told by the kernel, whether it is there before, comes, or is renamed into place."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from common.linux import inotify
from common.testing.isolation import in_event_loop

if TYPE_CHECKING:
    from pathlib import Path


@in_event_loop
async def test_a_file_that_was_there_before_is_not_waited_for(run_dir: Path) -> None:
    (run_dir / "a").touch()
    with inotify.watching(run_dir) as directory:
        await directory.wait_for("a")


@pytest.mark.parametrize("how", ["made", "renamed"])
@in_event_loop
async def test_a_file_that_comes_ends_the_wait_and_others_do_not(run_dir: Path, how: str) -> None:
    (run_dir / "old").touch()
    with inotify.watching(run_dir) as directory:
        waiting = asyncio.gather(directory.wait_for("a"))
        (run_dir / "b").touch()
        await asyncio.sleep(0)
        assert not waiting.done()
        if how == "made":
            (run_dir / "a").touch()
        else:
            (run_dir / "old").rename(run_dir / "a")
        await waiting


@in_event_loop
async def test_a_directory_that_is_not_there_is_said(run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError), inotify.watching(run_dir / "none"):
        pass
