"""What cannot start: the user is told phase, cause, value and remedy, and nothing is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.testing.containers import new_name, run
from common.testing.stack import DEVICE_MANAGER, GUEST, IMAGE, RUNTIME

if TYPE_CHECKING:
    from common.testing.stack import Stack


def refused(stack: Stack) -> str:
    """Run a container that cannot start; return what ctr said."""
    name = new_name()
    result = stack.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, name, "true")
    assert result.returncode == 1
    assert result.stdout == b""
    said = result.stderr.decode()
    assert f"sandbox {name} failed while " in said
    return said


def test_missing_kernel(stack: Stack) -> None:
    stack.write_config(section={"kernel": "/no/such/vmlinux"})
    said = refused(stack)
    assert "failed while reading the configuration" in said
    assert f"{stack.config}: hypervisor.qemu.kernel = '/no/such/vmlinux' is not a file" in said
    assert "(`make image` builds the guest's kernel and initrd" in said


def test_broken_configuration(stack: Stack) -> None:
    stack.config.write_text("[hypervisor.qemu\n")
    said = refused(stack)
    assert "failed while reading the configuration" in said
    assert f"configuration {stack.config} is not valid TOML" in said
    assert "at line 1" in said
    assert "(correct the file there)" in said


def test_a_kernel_that_is_none(stack: Stack) -> None:
    stack.write_config(section={"kernel": "/etc/passwd"})
    said = refused(stack)
    assert "failed while starting the VM: QEMU ended before it ran: qemu: linux kernel too old" in said
    assert "kernel /etc/passwd" in said


def test_a_guest_that_never_boots(stack: Stack) -> None:
    stack.write_config(section={"kernel_params": "rdinit=/no/such/init"})
    said = refused(stack)
    assert "failed while waiting for the guest's agent: the guest ended before its agent answered" in said
    assert "last lines of console:\n[" in said
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in said
    assert f"boots kernel {GUEST}/vmlinux, initrd {GUEST}/initrd.img" in said
    assert f"and kernel_params 'rdinit=/no/such/init' of {stack.config}" in said


def test_a_guest_that_hangs_while_booting(stack: Stack) -> None:
    stack.write_config(agent={"dial_timeout": 1})
    said = refused(stack)
    assert "failed while waiting for the guest's agent: the guest's agent did not answer within 1 s" in said
    assert "the VM is running" in said
    assert f"raise agent.kata.dial_timeout in {stack.config}" in said


@pytest.mark.parametrize(
    ("program", "phase"),
    [("vmm-manager-qemu", "starting the VM"), (DEVICE_MANAGER, "plugging the share")],
)
def test_a_service_that_is_down(stack: Stack, program: str, phase: str) -> None:
    stack.supervisorctl("stop", program)
    try:
        said = refused(stack)
    finally:
        stack.supervisorctl("start", program)
        stack.wait_ready()
    assert f"failed while {phase}: service {stack.services[program]} is down" in said
    assert "`supervisorctl status` shows whether the service runs" in said
    assert run(stack, "echo healed").stdout == b"healed\n"


def test_nobody_needs_the_monitor(stack: Stack) -> None:
    stack.supervisorctl("stop", "monitor")
    try:
        assert run(stack, "echo ran").stdout == b"ran\n"
    finally:
        stack.supervisorctl("start", "monitor")
