"""A file as a root file system that the host mounts: the loop device goes with the mount, whoever unmounts."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import paths
from common.errors import UsageError
from common.linux import loop, mounts
from common.protocols.task import Mount
from procs.shim import share

if TYPE_CHECKING:
    from collections.abc import Iterator

SANDBOX = "s1"


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system in a file; the run directory is the test's own."""
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    Path(paths.mounts_dir(SANDBOX)).mkdir(parents=True)
    content = tmp_path / "content"
    content.mkdir()
    (content / "hello").write_text("from the image")
    path = tmp_path / "image"
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(path), "4M"], check=True)
    yield path
    mounts.unmount_below(str(tmp_path))


def backed_by(path: Path) -> list[str]:
    """Return the loop devices of a file."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [file.parent.parent.name for file in files if file.read_text().strip() == str(path)]


def mount(image: Path, *options: str) -> Path:
    rootfs = [Mount(type="ext4", source=str(image), target="", options=["loop", *options])]
    asyncio.run(share.add_container(SANDBOX, "c1", rootfs, []))
    return Path(paths.mounts_dir(SANDBOX), "c1", "rootfs")


@pytest.mark.parametrize("options", [(), ("ro",)])
def test_the_device_lives_as_long_as_the_mount(image: Path, options: tuple[str, ...]) -> None:
    root = mount(image, *options)
    assert (root / "hello").read_text() == "from the image"
    (device,) = backed_by(image)
    assert Path(f"/sys/block/{device}/ro").read_text().strip() == str(int("ro" in options))
    mounts.unmount_below(str(root))
    assert backed_by(image) == []


def test_a_mount_that_fails_leaves_no_device(image: Path) -> None:
    with pytest.raises(UsageError, match="cannot mount ext4"):
        mount(image, "no-such-option")
    assert backed_by(image) == []


def test_a_device_without_a_mount_goes_at_once(image: Path) -> None:
    with loop.device(str(image), is_read_only=True) as node:
        assert backed_by(image) == [Path(node).name]
    assert backed_by(image) == []
