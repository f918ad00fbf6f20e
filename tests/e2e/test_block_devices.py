"""Block devices of the host in a container, as `ctr run --device` and `--mount` give them to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.linux import loop
from common.testing.containers import run, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.stack import Stack

pytestmark = pytest.mark.containerd


@pytest.fixture
def disk(stack: Stack) -> Iterator[str]:
    """A block device of the host."""
    content = stack.root / "disk"
    content.write_bytes(b"right".ljust(1 << 20))
    with loop.device(str(content), is_read_only=False) as node:
        yield node


def read_and_write(path: str) -> str:
    """Return the script of a container that reads from a disk and writes to it."""
    return f"head -c 5 {path}; printf new | dd of={path} conv=notrunc 2> /dev/null"


def at_a_mount(disk: str, *options: str) -> tuple[str, str]:
    """Return the flags of `ctr run` by which a container sees a disk at /mnt."""
    return "--mount", f"type=bind,src={disk},dst=/mnt/disk,options={':'.join(('bind', *options))}"


def test_a_device(stack: Stack, disk: str, runtime: str) -> None:
    result = run(stack, read_and_write(disk), "--device", disk, runtime=runtime)
    assert (result.stdout, result.returncode) == (b"right", 0)
    assert Path(disk).read_bytes().startswith(b"newht")


def test_a_disk_that_was_not_given_cannot_be_used(stack: Stack, disk: str, runtime: str) -> None:
    number = Path(disk).stat().st_rdev
    script = f"mknod /disk b {number >> 8} {number & 255} && head -c 5 /disk"
    assert run(stack, script, runtime=runtime).returncode == 1


@pytest.mark.parametrize("driver", ["virtio-blk", "virtio-scsi"])
def test_a_mount_may_be_used_and_is_writable(stack: Stack, disk: str, driver: str) -> None:
    """Under runc a rule has to allow it as well."""
    stack.write_config(section={"block_device_driver": driver})
    result = run(stack, read_and_write("/mnt/disk"), *at_a_mount(disk, "rw"))
    assert (result.stdout, result.returncode) == (b"right", 0)
    assert Path(disk).read_bytes().startswith(b"newht")


def test_a_read_only_mount_is_a_read_only_disk(stack: Stack, disk: str) -> None:
    result = run(stack, read_and_write("/mnt/disk"), *at_a_mount(disk, "ro"))
    assert (result.stdout, result.returncode) == (b"right", 1)
    assert Path(disk).read_bytes().startswith(b"right")


def test_what_one_sandbox_writes_no_other_gets_until_it_has_ended(stack: Stack, disk: str) -> None:
    with running(stack, "exec sleep 1000", "--device", disk):
        refused = run(stack, "true", "--device", disk)
        assert refused.returncode == 1
        assert disk.encode() in refused.stderr
    assert run(stack, "true", "--device", disk).returncode == 0
