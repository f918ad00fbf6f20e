"""`ctr run`: what a user of containers expects of one, through Debian's containerd. runc must pass all of it too."""

from __future__ import annotations

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import new_name, run
from common.testing.stack import IMAGE

if TYPE_CHECKING:
    from common.testing.stack import Stack


pytestmark = pytest.mark.containerd


def test_runs_another_kernel(stack: Stack) -> None:
    inside = run(stack, "uname -r").stdout.decode().strip()
    assert inside
    assert inside != platform.release()


def test_streams_are_kept_apart(stack: Stack, runtime: str) -> None:
    result = run(stack, "echo to-stdout; echo to-stderr >&2", runtime=runtime)
    assert (result.stdout, result.stderr, result.returncode) == (b"to-stdout\n", b"to-stderr\n", 0)


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -15 $$", 143)])
def test_exit_status_is_exact(stack: Stack, runtime: str, script: str, status: int) -> None:
    # Process 1 of a pid namespace ignores signals that it sends itself: a child is killed, its status passed on.
    assert run(stack, f"sh -c '{script}'; exit $?", runtime=runtime).returncode == status


def test_stdin_reaches_the_process_and_ends(stack: Stack, runtime: str) -> None:
    data = os.urandom(256 << 10)
    result = run(stack, "sha256sum; echo end", runtime=runtime, stdin=data)
    assert result.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  -\nend\n"


def test_binary_output_is_intact(stack: Stack, runtime: str) -> None:
    result = run(stack, "head -c 4194304 /dev/urandom > /tmp/x; cat /tmp/x; sha256sum /tmp/x >&2", runtime=runtime)
    assert len(result.stdout) == 4 << 20
    assert result.stderr.decode().split()[0] == hashlib.sha256(result.stdout).hexdigest()


def test_a_missing_program_is_named(stack: Stack, runtime: str) -> None:
    result = stack.ctr("run", "--rm", "--runtime", runtime, IMAGE, new_name(), "/no/such/program")
    assert result.returncode == 1
    assert b"/no/such/program" in result.stderr
    assert b"no such file or directory" in result.stderr.lower()


def test_much_is_read_ahead_from_a_share(stack: Stack) -> None:
    script = "device=$(awk '$5 == \"/\" {print $3}' /proc/self/mountinfo); cat /sys/class/bdi/$device/read_ahead_kb"
    assert run(stack, script).stdout == b"1024\n"


def test_what_the_container_writes_is_in_its_snapshot(stack: Stack, runtime: str) -> None:
    name = new_name()
    stack.ctr("run", "--runtime", runtime, IMAGE, name, "sh", "-c", "echo kept > /root/file", check=True)
    mounts = stack.ctr("snapshot", "mounts", str(stack.root / "m"), name, check=True)
    upper = Path(mounts.stdout.decode().split("upperdir=")[1].split(",")[0])
    assert (upper / "root/file").read_text() == "kept\n"
    stack.ctr("container", "rm", name, check=True)


def test_one_after_another_and_three_at_once(stack: Stack) -> None:
    many_runs(stack, rounds=3)


@pytest.mark.soak
def test_thirty_one_after_another_and_three_at_once(stack: Stack) -> None:
    many_runs(stack, rounds=30)


def many_runs(stack: Stack, *, rounds: int) -> None:
    """Run containers one after another, then three at once; each has its own output and exit code."""
    for number in range(rounds):
        check_run(stack, number)
        assert stack.remains() == []
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: check_run(stack, number), range(3)))
    assert stack.remains() == []


def check_run(stack: Stack, number: int) -> None:
    result = run(stack, f"echo out {number}; echo err {number} >&2; exit {number}")
    seen = (result.returncode, result.stdout.decode(), result.stderr.decode())
    assert seen == (number, f"out {number}\n", f"err {number}\n")
