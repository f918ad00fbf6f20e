"""A root file system in a file, as block snapshotters have it, through a real containerd. runc must pass it too.

Debian's containerd 1.6 has no such snapshotter that works without device mapper (newer ones have:
tests/e2e/test_snapshotters.py). What one would answer, the mounts of the root file system, is therefore given to
containerd's own Task API: the shim sees what it would see.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import grpc
import pytest

from common.linux import loop
from common.protobuf import Message, messages, string, uint
from common.protocols.task import Mount
from common.testing.containers import RUNC, new_name
from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from pathlib import Path

    from common.testing.stack import Stack

_NAMESPACE = (("containerd-namespace", "default"),)
_TASKS = "/containerd.services.tasks.v1.Tasks/"


class CreateTask(Message):
    """``containerd.services.tasks.v1.CreateTaskRequest``."""

    container_id: str = string(1)
    rootfs: list[Mount] = messages(3, Mount)


class TaskRef(Message):
    """``StartRequest``, ``WaitRequest`` and ``DeleteTaskRequest`` of the same package."""

    container_id: str = string(1)


class Status(Message):
    """``WaitResponse``."""

    exit_status: int = uint(1)


class Tasks:
    """containerd's Task API for one container that exists."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._name = name
        self._channel = grpc.insecure_channel(f"unix://{stack.socket}")

    def call(self, method: str, request: Message) -> bytes:
        call = self._channel.unary_unary(_TASKS + method, request_serializer=Message.encode)
        answer: bytes = call(request, timeout=120, metadata=_NAMESPACE)
        return answer

    def run(self, rootfs: Mount) -> int:
        """Create and start the task, wait for its end, delete it; return its status."""
        self.call("Create", CreateTask(container_id=self._name, rootfs=[rootfs]))
        me = TaskRef(container_id=self._name)
        try:
            self.call("Start", me)
            return Status.decode(self.call("Wait", me)).exit_status
        finally:
            self.call("Delete", me)


SCRIPT = """test -s /written && exit 0
grep ' / ' /proc/mounts > /written || exit 6
exit 7
"""
"""The first container notes on its disk what its root is, the second finds it noted."""


@pytest.fixture
def image(stack: Stack) -> Path:
    """A disk with busybox and the script."""
    content, path = stack.root / "content", stack.root / "image.ext4"
    if not content.exists():
        make_busybox_rootfs(content)
        (content / "script").write_text(SCRIPT)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(path), "16M"], check=True)
    return path


def run(stack: Stack, runtime: str, rootfs: Mount) -> int:
    """Run the script in a container on a root file system; return its status."""
    name = new_name()
    stack.ctr("container", "create", "--runtime", runtime, IMAGE, name, "sh", "/script", check=True)
    try:
        return Tasks(stack, name).run(rootfs)
    finally:
        stack.ctr("container", "rm", name)


def written_in(image: Path) -> str:
    """Return what a container wrote into its root file system, read from the disk itself."""
    command = ["/sbin/debugfs", "-R", "cat /written", str(image)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("runtime", "qemu", "root"),
    [
        (RUNC, {}, "/dev/loop"),
        (RUNTIME, {}, "kataShared / virtiofs"),
        (RUNTIME, {"disable_block_device_use": False}, "/dev/vda"),
        (RUNTIME, {"disable_block_device_use": False, "block_device_driver": "virtio-scsi"}, "/dev/sda"),
    ],
    ids=["runc", "shared", "virtio-blk", "virtio-scsi"],
)
def test_a_container_on_a_disk(stack: Stack, image: Path, runtime: str, qemu: dict[str, object], root: str) -> None:
    stack.write_config(section=qemu)
    rootfs = Mount(type="ext4", source=str(image), target="", options=["loop"])
    assert run(stack, runtime, rootfs) == 7
    assert written_in(image).startswith(root)
    assert run(stack, runtime, rootfs) == 0, "the same file, at once"


@pytest.mark.parametrize(
    ("runtime", "qemu", "root"),
    [
        (RUNC, {}, "pool-snap-1"),
        (RUNTIME, {}, "kataShared"),
        (RUNTIME, {"disable_block_device_use": False}, "/dev/vda"),
    ],
    ids=["runc", "shared", "virtio-blk"],
)
def test_a_container_on_a_block_device(
    stack: Stack, image: Path, runtime: str, qemu: dict[str, object], root: str
) -> None:
    """As containerd's devmapper has it: a link to a device, which needs no loop device of ours."""
    stack.write_config(section=qemu)
    snapshot = stack.root / "pool-snap-1"
    with loop.device(str(image), is_read_only=False) as node:
        snapshot.symlink_to(node)
        rootfs = Mount(type="ext4", source=str(snapshot), target="", options=["rw"])
        assert run(stack, runtime, rootfs) == 7
        assert run(stack, runtime, rootfs) == 0
        snapshot.unlink()
    assert root in written_in(image).split(" / ")[0]


def test_a_read_only_disk(stack: Stack, image: Path) -> None:
    stack.write_config(section={"disable_block_device_use": False})
    rootfs = Mount(type="ext4", source=str(image), target="", options=["loop", "ro"])
    assert (run(stack, RUNTIME, rootfs), written_in(image)) == (6, "")


def test_a_disk_without_a_file_system_is_said(stack: Stack) -> None:
    stack.write_config(section={"disable_block_device_use": False})
    path = stack.root / "image.empty"
    path.write_bytes(bytes(1 << 20))
    rootfs = Mount(type="ext4", source=str(path), target="", options=["loop"])
    with pytest.raises(grpc.RpcError, match=r"cannot mount ext4 '/dev/vda' at .*: Invalid argument"):
        run(stack, RUNTIME, rootfs)
