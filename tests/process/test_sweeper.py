"""What a test runner that is killed has on the host goes."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.linux import cgroup, mounts

RUNNER = """
import os, subprocess, sys, tempfile
from pathlib import Path
from common import paths
from common.linux import cgroup, mounts
from common.testing.sweeper import Sweeper

sweeper = Sweeper()
directory = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
sweeper.note(str(directory))
os.environ[paths.RUN_DIR_VARIABLE] = str(directory)
named, nameless = f"named-{os.getpid()}", f"nameless-{os.getpid()}"
jail = Path(paths.vm_dir(named)) / "jail"
jail.mkdir(parents=True)
cgroup.create(named)
mounts.mount("tmpfs", str(jail), "tmpfs")
enter = 'echo 0 > "$0" && exec sleep 1000'
child = subprocess.Popen(["sh", "-c", enter, f"{cgroup.create(nameless)}/cgroup.procs"], start_new_session=True)
print(sweeper.pid, child.pid, directory, named, nameless, flush=True)
input()
sweeper.close()
"""
"""Leaves a process in a cgroup that nothing else tells of, and an empty cgroup of a sandbox with a mount."""


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ended"])
def test_what_a_runner_has_goes_with_it(is_killed: bool) -> None:
    command = [sys.executable, "-P", "-c", RUNNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        sweeper, child, directory, *sandboxes = runner.stdout.readline().split()
        assert mounts.mounted_below(directory)
        assert all(Path(cgroup.path(name)).is_dir() for name in sandboxes)
        with open(os.pidfd_open(int(sweeper))) as pidfd:  # noqa: PTH123 - a number
            if is_killed:
                runner.kill()
            else:
                runner.stdin.write("\n")
                runner.stdin.flush()
            waiter = select.poll()
            waiter.register(pidfd, select.POLLIN)
            assert waiter.poll(60_000), "the sweeper does not end"
        assert mounts.mounted_below(directory) == []
        assert not Path(directory).exists()
        assert [name for name in sandboxes if Path(cgroup.path(name)).exists()] == []
        assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
