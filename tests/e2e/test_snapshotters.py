"""Root file systems as containerd's snapshotters make them: directories, files with a file system, layers.

Which snapshotters there are depends on the containerd: Debian's 1.6 has those that make directories, 1.7 has blockfile,
2.1 and newer have erofs. What works with devmapper only is in tests/e2e/test_disks.py.
"""

from __future__ import annotations

import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import RUNC, new_name
from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from pathlib import Path

    from common.testing.stack import Stack

pytestmark = pytest.mark.containerd

SHARED, DISK = "kataShared / virtiofs", "/dev/vda / ext4"
NOTHING: dict[str, object] = {}
DISKS: dict[str, object] = {"disable_block_device_use": False}
ROOTS = {
    "native": ((RUNTIME, NOTHING, SHARED),),
    "blockfile": ((RUNTIME, NOTHING, SHARED), (RUNTIME, DISKS, DISK)),
    "erofs": ((RUNTIME, NOTHING, SHARED), (RUNTIME, DISKS, "overlay / overlay")),
}
"""What a guest has as a container's root, by snapshotter and configuration."""

SCRIPT = "test -s /root/kept && exec cat /root/kept; grep -o '^[^ ]* / [^ ]*' /proc/mounts > /root/kept; exit 7"
"""The first task notes what its root is, the second finds it noted."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    directory: Path | None = metafunc.config.getoption("containerd")
    program = directory / "containerd" if directory else "containerd"
    default = subprocess.run([program, "config", "default"], capture_output=True, text=True, check=True).stdout
    plugins = tomllib.loads(default)["plugins"]
    cases = [
        pytest.param(snapshotter, *case, id="-".join((snapshotter, case[0].split(".")[2], *case[1])))
        for snapshotter, roots in ROOTS.items()
        for case in ((RUNC, NOTHING, ""), *roots)
        if f"io.containerd.snapshotter.v1.{snapshotter}" in plugins
    ]
    metafunc.parametrize(("snapshotter", "runtime", "section", "root"), cases)


def test_a_root_file_system_and_what_was_written_to_it(
    stack: Stack, snapshotter: str, runtime: str, section: dict[str, object], root: str
) -> None:
    stack.write_config(section=section)
    name = new_name()
    flags = ("--runtime", runtime, "--snapshotter", snapshotter)
    first = stack.ctr("run", *flags, IMAGE, name, "sh", "-c", SCRIPT)
    second = stack.ctr("task", "start", name)
    stack.ctr("container", "rm", name, check=True)
    assert (first.returncode, second.returncode) == (7, 0), first.stderr + second.stderr
    assert second.stdout.decode().strip().startswith(root)
