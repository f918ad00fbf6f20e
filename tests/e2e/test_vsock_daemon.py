"""Containers whose guest is reached through a vsock daemon, by `ctr`: `make test-vsock` runs them with a real one."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from common.testing import vsock_daemon
from common.testing.containers import attached, execute, run, running

if TYPE_CHECKING:
    from pathlib import Path

    from common.testing.stack import Stack


@pytest.fixture(autouse=True)
def daemon(stack: Stack, tmp_path: Path) -> None:
    """Have the test's containers use one."""
    section = {"vhost_user_vsock_daemon": vsock_daemon.install(tmp_path)}
    stack.write_config(section=section, agent={"dial_timeout": 120})


def test_streams_both_ways_execs_and_the_exit_status(stack: Stack) -> None:
    with running(stack) as name:
        data = os.urandom(256 << 10)
        ctr = ("task", "exec", "--exec-id", "e1", name, "sh", "-c", "sha256sum; echo wrong >&2; exit 3")
        result = stack.ctr(*ctr, stdin=data)
        assert result.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  -\n"
        assert (result.stderr, result.returncode) == (b"wrong\n", 3)
        devices = execute(stack, name, "sh", "-c", "ls /sys/class/virtio-ports; cat /proc/modules").stdout.decode()
        assert "vmw_vsock_virtio_transport " in devices
        assert "vport" not in devices, "there is no other channel"


def test_much_output_is_intact(stack: Stack) -> None:
    result = run(stack, "head -c 4194304 /dev/urandom > /tmp/x; cat /tmp/x; sha256sum /tmp/x >&2")
    assert len(result.stdout) == 4 << 20
    assert result.stderr.decode().split()[0] == hashlib.sha256(result.stdout).hexdigest()


def test_the_daemon_is_killed(stack: Stack) -> None:
    """Nobody could reach its guest any more: the VM ends, and so do all who wait for the container."""
    with attached(stack, "echo ready; exec sleep 1000") as container:
        assert container.read_line() == "ready"
        (process,) = stack.processes(vsock_daemon.NAME)
        process.kill()
        assert container.wait() == 137
        assert stack.remains() == []
