"""What goes wrong: the user is told what, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import execute, running
from common.testing.stack import IMAGE, RUNTIME, SERVICES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import psutil

    from common.testing.stack import Stack


def refused(stack: Stack) -> str:
    """Run a container that cannot start; return what ctr said."""
    result = stack.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, "unlucky", "true", timeout_s=60)
    stack.ctr("container", "rm", "unlucky")
    assert result.returncode != 0
    return result.stderr.decode()


def one(stack: Stack, name: str) -> psutil.Process:
    """Return the one process of this stack whose command line has a word that ends in a name."""
    found = [p for p in stack.processes() if any(word.endswith(name) for word in p.cmdline()[:4])]
    assert len(found) == 1, found
    return found[0]


@contextmanager
def events(stack: Stack) -> Iterator[Iterable[str]]:
    """What containerd publishes, as lines of `ctr events`."""
    with subprocess.Popen(stack.ctr_argv("events"), env=stack.environment, stdout=subprocess.PIPE, text=True) as ctr:
        assert ctr.stdout is not None
        try:
            yield ctr.stdout
        finally:
            ctr.kill()


def _until_deleted(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of `ctr events` up to the deletion of a task: containerd has cleaned up then."""
    for line in lines:
        yield line
        if "/tasks/delete" in line:
            return


def test_missing_kernel(stack: Stack) -> None:
    stack.write_config(qemu={"kernel": "/no/such/vmlinux"})
    said = refused(stack)
    assert "hypervisor.qemu.kernel = '/no/such/vmlinux' is not a file" in said
    assert "make image" in said


def test_broken_configuration(stack: Stack) -> None:
    stack.config.write_text("[hypervisor.qemu\n")
    said = refused(stack)
    assert f"configuration {stack.config} is not valid TOML" in said
    assert "line 1" in said


def test_a_guest_that_never_boots(stack: Stack) -> None:
    stack.write_config(qemu={"kernel_params": "rdinit=/no/such/init"}, agent={"dial_timeout": 20})
    said = refused(stack)
    assert "waiting for the guest's agent" in said
    assert "Kernel panic - not syncing" in said, "the console's last lines are in the error"


def test_a_guest_that_hangs(stack: Stack) -> None:
    stack.write_config(qemu={"kernel_params": "rdinit=/bin/true break"}, agent={"dial_timeout": 1})
    assert "waiting for the guest's agent" in refused(stack)


def test_the_shim_is_killed(stack: Stack) -> None:
    with events(stack) as lines, running(stack):
        one(stack, "containerd-shim-kata-v2").kill()
        topics = [line.split()[5] for line in _until_deleted(lines)]
        assert topics[-2:] == ["/tasks/exit", "/tasks/delete"]
        assert stack.remains() == []


def test_the_vmm_is_killed(stack: Stack) -> None:
    with events(stack) as lines, running(stack) as name:
        one(stack, "qemu-system-x86_64").kill()
        exited = next(line for line in lines if "/tasks/exit" in line)
        assert json.loads(exited.split(maxsplit=6)[6])["exit_status"] == 137
        listed = stack.ctr("task", "ls").stdout.decode()
        assert [line.split()[2] for line in listed.splitlines() if line.startswith(name)] == ["STOPPED"]


def test_the_agent_is_killed(stack: Stack) -> None:
    with running(stack) as name:
        # Signals from inside the container do not reach the agent; a panic ends it as well, and all else with it.
        execute(stack, name, "sh", "-c", "mkdir -p /p; mount -t proc p /p; echo c > /p/sysrq-trigger")
        stack.ctr("task", "rm", "-f", name)


@pytest.mark.parametrize("program", ["vmm-manager-qemu", "device-manager"])
def test_a_service_is_down(stack: Stack, program: str) -> None:
    stack.supervisorctl("stop", program)
    try:
        said = refused(stack)
    finally:
        stack.supervisorctl("start", program)
        stack.wait_ready()
    assert f"service {SERVICES[program]} is down" in said
    assert "supervisorctl" in said


@pytest.mark.parametrize("program", ["vmm-manager-qemu", "device-manager", "monitor"])
def test_restarting_a_service_disturbs_nothing(stack: Stack, program: str) -> None:
    with running(stack) as name:
        assert execute(stack, name, "echo", "before").stdout == b"before\n"
        stack.supervisorctl("restart", program)
        assert execute(stack, name, "echo", "after").stdout == b"after\n"
        stack.wait_ready()
        assert execute(stack, name, "echo", "still").stdout == b"still\n"


def test_killing_every_service_disturbs_nothing(stack: Stack) -> None:
    with running(stack) as name:
        for program in (*SERVICES, "monitor"):
            os.kill(int(stack.supervisorctl("pid", program)), signal.SIGKILL)
        assert execute(stack, name, "echo", "alive").stdout == b"alive\n"
        stack.wait_ready()


def test_the_end_of_a_container_while_every_service_is_down(stack: Stack) -> None:
    with running(stack) as name:
        stack.supervisorctl("stop", "all")
        try:
            stack.ctr("task", "rm", "-f", name, check=True)
            assert stack.remains() == []
        finally:
            stack.supervisorctl("start", "all")
            stack.wait_ready()
