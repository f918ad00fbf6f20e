"""Upstream's agent in a VM that the VM manager starts, reached through a vsock daemon, by `ctr`.

The tests' own daemon, or a real one if ``PYKATA_TEST_VSOCK_DAEMON`` names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.testing import vsock_daemon
from common.testing.containers import attached, execute, run, running
from common.testing.stack import Stack

if TYPE_CHECKING:
    from pathlib import Path

_PARAMETERS = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"


def test_containers_as_ctr_runs_them(images: tuple[Path, Path], tmp_path: Path) -> None:
    vmlinux, initrd = map(str, images)
    daemon = vsock_daemon.install(tmp_path)
    section = {"kernel": vmlinux, "initrd": initrd, "kernel_params": _PARAMETERS, "vhost_user_vsock_daemon": daemon}
    with Stack(section=section) as stack:
        stack.write_config(agent={"dial_timeout": 120})
        result = run(stack, "cat; echo wrong >&2; exit 3", stdin=b"right\n")
        assert (result.stdout, result.stderr, result.returncode) == (b"right\n", b"wrong\n", 3)
        with running(stack) as name:
            assert len(execute(stack, name, "head", "-c", "1000000", "/dev/zero").stdout) == 1_000_000
        with attached(stack, "echo ready; exec sleep 1000") as container:
            assert container.read_line() == "ready"
            (process,) = stack.processes(vsock_daemon.NAME)
            process.kill()
            assert container.wait() == 137
    assert stack.left_behind == []
