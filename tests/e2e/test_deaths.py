"""A process under a container dies or hangs: its exit is 137, the client is told, and nothing is left."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.protocols.events import TaskExit
from common.testing.containers import attached, execute, running, status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

    from common.protocols.events import Envelope
    from common.testing.stack import Stack

_SLEEP = "echo ready; exec sleep 1000"
_CRASH = "mkdir -p /p && mount -t proc p /p && echo c > /p/sysrq-trigger"  # linux: admin-guide/sysrq.rst


def the(stack: Stack, program: str) -> psutil.Process:
    """Return the one process that runs a program."""
    (process,) = stack.processes(program)
    return process


def test_the_shim_is_killed(stack: Stack, task_events: Iterator[Envelope]) -> None:
    with running(stack) as name:
        the(stack, "containerd-shim-kata-v2").kill()
        exited = next(event for event in task_events if event.topic == "/tasks/exit")
        assert exited.event is not None
        assert TaskExit.decode(exited.event.value).exit_status == 137
        assert next(task_events).topic == "/tasks/delete"
        assert status(stack, name) == ""
        assert stack.remains() == []


def test_the_vmm_is_killed(stack: Stack) -> None:
    with attached(stack, _SLEEP) as container:
        assert container.read_line() == "ready"
        the(stack, "qemu-system-x86_64").kill()
        assert container.wait() == 137
        assert stack.remains() == []


def test_virtiofsd_is_killed(stack: Stack) -> None:
    """Its guest would wait for the root file system for ever: the VM ends, and so do all who wait for the container."""
    with attached(stack, _SLEEP) as container:
        assert container.read_line() == "ready"
        for process in stack.processes("virtiofsd"):
            process.kill()
        assert container.wait() == 137
        assert stack.remains() == []


def test_the_agent_is_killed(stack: Stack) -> None:
    # No signal from a container reaches the agent, which is process 1 of the guest; what ends it is a panic.
    with running(stack, "exec sleep 1000", "--privileged") as name, stack.new_lines("containerd.log") as lines:
        crashed = execute(stack, name, "sh", "-c", _CRASH)
        assert crashed.returncode == 137
        assert status(stack, name) == "STOPPED"
        refused = execute(stack, name, "true")
        assert refused.returncode == 1
        assert b"cannot exec in a stopped state" in refused.stderr
        said = next(line for line in lines if "the VM ended by itself" in line)
        assert "Kernel panic - not syncing: sysrq triggered crash" in said
        stack.ctr("task", "rm", name)
        assert stack.remains() == []


def test_the_hosts_disk_is_full(stack: Stack, runtime: str, tmp_path: Path) -> None:
    """Who writes is told, and all else goes on."""
    with full(tmp_path) as disk:
        mount = ("--mount", f"type=bind,src={disk},dst=/data,options=rbind:rw")
        with running(stack, "exec sleep 1000", *mount, runtime=runtime) as name:
            refused = execute(stack, name, "dd", "if=/dev/zero", "of=/data/file", "bs=64k", "count=64")
            assert refused.returncode == 1
            assert b"No space left on device" in refused.stderr
            assert execute(stack, name, "echo", "on").stdout == b"on\n"


@contextmanager
def full(directory: Path) -> Iterator[Path]:
    """A file system with little space."""
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["/bin/umount", directory], check=True)


def test_the_guest_hangs(stack: Stack) -> None:
    with attached(stack, _SLEEP) as container:
        assert container.read_line() == "ready"
        the(stack, "qemu-system-x86_64").suspend()
        stack.ctr("task", "kill", "-s", "SIGKILL", container.name, check=True)
        assert container.wait() == 137
        assert stack.remains() == []
