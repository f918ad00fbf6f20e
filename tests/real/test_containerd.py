"""Whole containers from containerd's devmapper snapshotter on real hypervisors, one after the other.

Each has its root and a volume on a thin disk. containerd removes the root's when the shim has given it back, which
device-mapper refuses while anybody has it open.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import new_name
from common.testing.real_vmms import REAL
from common.testing.stack import IMAGE, RUNTIME, Stack
from common.testing.thin_pool import dmsetup, empty_pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from common.testing.thin_pool import ThinPool

_ROUNDS = 3
_POOL = "kt-containerd"
_BOOT_TIMEOUT_S = 300
_RUN_TIMEOUT_S = 900
_MUCH = 1 << 20
_SCRIPT = """
grep -o '^/dev/vd[a-z] / ext4' /proc/mounts
dd if=/dev/volume bs=2 skip=540 count=1 2>/dev/null | od -An -tx1
"""
"""What its root is, and the magic number of the volume's ext4 (fs/ext4/ext4.h: 0xef53 at byte 1080)."""


@pytest.fixture(params=list(REAL.values()), ids=list(REAL))
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A host whose containerd has a devmapper snapshotter on a pool of its own."""
    monkeypatch.setenv("DM_DISABLE_UDEV", "1")  # there is none that would make nodes
    config = {key: str(value) for key, value in request.param.config.items()}
    section = {**config, "path": request.param.program, "disable_block_device_use": False}
    devmapper = {"pool_name": _POOL, "root_path": str(tmp_path / "snapshots"), "base_image_size": "64MB"}
    plugins = {"io.containerd.snapshotter.v1.devmapper": devmapper}
    with (
        empty_pool(tmp_path, _POOL),
        Stack(hypervisor=request.param.hypervisor, section=section, plugins=plugins) as running,
    ):
        running.write_config(agent={"dial_timeout": _BOOT_TIMEOUT_S})
        yield running
        for image in running.ctr("image", "ls", "-q").stdout.decode().split():
            running.ctr("image", "rm", "--sync", image, check=True)
        assert _snapshots() == set()
    assert running.left_behind == []


def test_containers_and_volumes_come_and_go_and_leave_no_disk(stack: Stack, pool: ThinPool) -> None:
    volume = pool.snapshot("volume")
    for number in range(_ROUNDS):
        mount = f"type=bind,src={volume},dst=/dev/volume,options=rbind:rw"
        command = ("--snapshotter", "devmapper", "--runtime", RUNTIME, "--mount", mount, IMAGE, new_name())
        began = time.monotonic()
        ran = stack.ctr("run", "--rm", *command, "sh", "-c", _SCRIPT, timeout_s=_RUN_TIMEOUT_S)
        print(f"round {number}: {time.monotonic() - began:.1f} s\n{stack.logs()}")  # noqa: T201 - for who looks at it
        assert (ran.stdout.decode().split(), ran.returncode) == (["/dev/vda", "/", "ext4", "53", "ef"], 0), ran.stderr
        assert stack.remains() == []
        _collect(stack)
        assert _snapshots() == set(), "a container's snapshot is gone with it"
    pool.remove("volume")


def test_streams_are_whole_and_an_exec_tells_how_it_ended(stack: Stack) -> None:
    name = new_name()
    options = ("--snapshotter", "devmapper", "--runtime", RUNTIME)
    stack.ctr("run", "-d", *options, IMAGE, name, "sleep", "100000", timeout_s=_RUN_TIMEOUT_S, check=True)
    script = "cat; echo wrong >&2; exit 3"
    ran = stack.ctr(
        "task", "exec", "--exec-id", "e1", name, "sh", "-c", script, stdin=b"right", timeout_s=_RUN_TIMEOUT_S
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == (b"right", b"wrong\n", 3)
    zeros = stack.ctr(
        "task", "exec", "--exec-id", "e2", name, "head", "-c", str(_MUCH), "/dev/zero", timeout_s=_RUN_TIMEOUT_S
    )
    assert zeros.stdout == bytes(_MUCH)
    stack.ctr("task", "kill", "--signal", "9", name, check=True)
    stack.ctr("task", "rm", "-f", name, check=True)
    stack.ctr("container", "rm", name, check=True)
    assert stack.remains() == []


def _collect(stack: Stack) -> None:
    """Have containerd remove what belongs to nobody any more, and wait for that; by itself it does so at some time."""
    lease = stack.ctr("leases", "create", check=True).stdout.decode().strip()
    stack.ctr("leases", "delete", "--sync", lease, check=True)


def _snapshots() -> set[str]:
    """Return the disks that containerd has made active; those of images are not."""
    return set(re.findall(rf"^{_POOL}-snap\S*", dmsetup("ls"), re.MULTILINE))
