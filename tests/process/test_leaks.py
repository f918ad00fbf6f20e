"""The leak checker finds what its stack left, nothing of anybody else, and removes it."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import uuid
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from common import paths
from common.linux import cgroup, mounts
from common.testing.leaks import SHIM_SOCKETS, Footprint, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def footprint(run_dir: Path) -> Footprint:
    (run_dir / "log").mkdir()
    return Footprint(root=run_dir, run_dir=run_dir, address=run_dir / "containerd.sock", grace_s=0)


@contextmanager
def running(name: str, directory: Path, run_dir: Path) -> Iterator[str]:
    """A process of that name, of the stack with that run directory; yields what is said of it."""
    program = directory / name
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "1000"], env={paths.RUN_DIR_VARIABLE: str(run_dir)}) as process:
        yield f"process {process.pid} {name}"
        process.kill()


def leave_mount(root: Path) -> str:
    point = root / "point"
    point.mkdir()
    mounts.mount("none", str(point), "tmpfs")
    return f"mount {point}"


def leave_socket(address: str, sandbox: str) -> str:
    SHIM_SOCKETS.mkdir(parents=True, exist_ok=True)
    path = SHIM_SOCKETS / hashlib.sha256(f"{address}/default/{sandbox}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return f"socket {path}"


def leave_bundle(root: Path, sandbox: str) -> str:
    bundle = root / "state/io.containerd.runtime.v2.task/default" / sandbox
    bundle.mkdir(parents=True)
    return f"bundle {bundle}"


def test_everything_that_a_container_leaves_is_found_and_removed(footprint: Footprint) -> None:
    root, sandbox = footprint.root, f"t{uuid.uuid4().hex[:8]}"
    assert footprint.everything() == []
    (footprint.run_dir / "log/service.log").write_text(f'{{"event": "VM started", "sandbox": "{sandbox}"}}\n')
    (footprint.run_dir / "sandboxes" / sandbox).mkdir(parents=True)
    cgroup.create(sandbox)
    left = [f"sandbox directory {sandbox}", f"cgroup {sandbox}", leave_mount(root)]
    left += [leave_socket(str(footprint.address), sandbox), leave_bundle(root, sandbox)]
    with ExitStack() as stack:
        names = ("containerd-shim", "qemu", "cloud-hypervisor", "firecracker", "virtiofsd")
        left += [stack.enter_context(running(name, root, root)) for name in names]
        assert sorted(footprint.of_containers()) == sorted(left)
        service = stack.enter_context(running("service", root, root))
        assert sorted(footprint.everything()) == sorted([*left, service])
        footprint.remove()
        assert footprint.everything() == [f"sandbox directory {sandbox}", left[4]]


def test_what_belongs_to_others_is_left_alone(footprint: Footprint, tmp_path: Path) -> None:
    with running("qemu", footprint.root, tmp_path):
        assert footprint.everything() == []


def test_a_process_that_ends_while_it_is_looked_at_has_no_name() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as child:
        process = psutil.Process(child.pid)
        assert name_of(process) == "sleep"
        child.kill()
    assert name_of(process) == ""
