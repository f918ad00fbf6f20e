"""Services and containerd die and come back under running containers, which do not notice."""

from __future__ import annotations

import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest

from common.protocols.events import TaskDelete
from common.testing.containers import attached, attached_to, execute, new_name, run, running, status
from common.testing.stack import DEVICE_MANAGER, IMAGE, RUNTIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.protocols.events import Envelope
    from common.testing.stack import Stack

pytestmark = pytest.mark.containerd

_PROGRAMS = ("vmm-manager-qemu", DEVICE_MANAGER, "monitor", "shim-host")
_ECHO = 'while read line; do echo "got $line"; done; exit 5'


@pytest.mark.parametrize("program", _PROGRAMS)
def test_restarting_a_service_disturbs_nothing(stack: Stack, program: str) -> None:
    with attached(stack, _ECHO) as container:
        container.write_line("before")
        assert container.read_line() == "got before"
        assert "started" in stack.supervisorctl("restart", program)
        container.write_line("after")
        assert container.read_line() == "got after"
        assert execute(stack, container.name, "echo", "exec").stdout == b"exec\n"
        stack.wait_ready()
        assert execute(stack, container.name, "echo", "still").stdout == b"still\n"
        container.end_input()
        assert container.wait() == 5


def test_killing_every_service_disturbs_nothing(stack: Stack) -> None:
    with attached(stack, _ECHO) as container:
        container.write_line("before")
        assert container.read_line() == "got before"
        for program in _PROGRAMS:
            os.kill(int(stack.supervisorctl("pid", program)), signal.SIGKILL)
        container.write_line("alive")
        assert container.read_line() == "got alive"
        assert execute(stack, container.name, "echo", "alive").stdout == b"alive\n"
        stack.wait_ready()
        container.end_input()
        assert container.wait() == 5


@pytest.mark.parametrize(
    "phase", ["starting the VM", "plugging the share", "waiting for the guest's agent", "sharing the file system"]
)
def test_services_that_die_during_a_start(stack: Stack, phase: str) -> None:
    """The container runs, or its user is told; either way nothing stays, and the next one is none the worse."""
    pids = [int(stack.supervisorctl("pid", program)) for program in stack.services]
    with stack.new_lines("containerd.log") as lines, ThreadPoolExecutor(1) as pool:
        started = pool.submit(run, stack, "echo ran")
        next(line for line in lines if f'"phase": "{phase}"' in line)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        result = started.result()
    stack.wait_ready()
    said = result.stderr.decode()
    if result.returncode:
        assert re.search(r"failed while [^:]+: service \S+ (is|went) down", said)
        assert "`supervisorctl status` shows whether the service runs" in said
    else:
        assert result.stdout == b"ran\n"
    assert stack.remains() == []


@pytest.mark.parametrize("is_shim_killed", [False, True], ids=["removed", "its shim killed"])
def test_a_container_ends_while_every_service_is_down(
    stack: Stack, task_events: Iterator[Envelope], is_shim_killed: bool
) -> None:
    """By its shim, or by the `delete` that containerd executes when that has died."""
    with running(stack) as name:
        stack.supervisorctl("stop", "all")
        try:
            if is_shim_killed:
                kill_processes(stack, "containerd-shim-kata-v2")
                next(event for event in task_events if event.topic == TaskDelete.TOPIC)
            else:
                stack.ctr("task", "rm", "-f", name, check=True)
            assert stack.remains() == []
        finally:
            stack.supervisorctl("start", "all")
            stack.wait_ready()
    assert run(stack, "echo healed").stdout == b"healed\n"


def kill_containerd(stack: Stack) -> None:
    """End it as a crash would.

    A bundle that it was in the middle of deleting has a name with a dot in front, and no containerd takes that up again
    (``loadShims`` in runtime/v2/shim_load.go of v1.6.20).
    """
    stack.containerd.kill()
    stack.containerd.wait()
    for bundle in (stack.root / "state").glob("*.task/*/.*"):
        shutil.rmtree(bundle)


def kill_processes(stack: Stack, program: str) -> None:
    """Kill what runs a program, and wait for its end."""
    found = stack.processes(program)
    assert found
    for process in found:
        process.kill()
    psutil.wait_procs(found)


def test_a_container_outlives_containerd(stack: Stack, runtime: str) -> None:
    with running(stack, _ECHO, runtime=runtime) as name:
        execute(stack, name, "touch", "/before")
        kill_containerd(stack)
        stack.start_containerd()
        assert status(stack, name) == "RUNNING"
        assert execute(stack, name, "ls", "/before").stdout == b"/before\n"
        with attached_to(stack, name) as container:
            container.write_line("after")
            assert container.read_line() == "got after"
            stack.ctr("task", "kill", "-s", "SIGKILL", name, check=True)
            assert container.wait() == 137


def test_a_shim_logs_to_the_containerd_that_started_again(stack: Stack) -> None:
    with running(stack) as name:
        kill_containerd(stack)
        stack.start_containerd()
        with stack.new_lines("containerd.log") as lines:
            stack.ctr("task", "kill", "-s", "SIGKILL", name, check=True)
            assert any('"event": "sandbox stopped"' in line for line in lines)


@pytest.mark.parametrize("phase", ["starting the VM", "waiting for the guest's agent"])
def test_containerd_dies_while_a_container_is_created(stack: Stack, phase: str) -> None:
    """Before it has asked for that, or after: what nobody can find ends by itself, the rest can be removed."""
    with stack.new_lines("containerd.log") as lines, ThreadPoolExecutor(1) as pool:
        name = new_name()
        created = pool.submit(stack.ctr, "run", "--runtime", RUNTIME, IMAGE, name, "true")
        next(line for line in lines if f'"phase": "{phase}"' in line)
        shims = stack.processes("containerd-shim-kata-v2")
        kill_containerd(stack)
        assert created.result().returncode == 1
    stack.start_containerd()
    stack.ctr("task", "rm", "-f", name)
    _, alive = psutil.wait_procs(shims, timeout=60)
    assert alive == []
    kill_containerd(stack)
    stack.start_containerd()  # it has cleared up bundles without a shim when it says that it is ready
    assert stack.remains() == []
    stack.ctr("container", "rm", name, check=True)


def test_a_vm_that_died_without_containerd_is_stopped(stack: Stack) -> None:
    with running(stack) as name:
        kill_containerd(stack)
        kill_processes(stack, "qemu-system-x86_64")
        stack.start_containerd()
        assert status(stack, name) == "STOPPED"


def test_a_shim_that_died_without_containerd_is_cleaned_up(stack: Stack) -> None:
    with running(stack) as name:
        kill_containerd(stack)
        kill_processes(stack, "containerd-shim-kata-v2")
        stack.start_containerd()
        assert status(stack, name) == ""
        assert stack.remains() == []
