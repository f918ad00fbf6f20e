"""`ctr run`: what a user of containers expects of one, through Debian's containerd."""

from __future__ import annotations

import hashlib
import os
import platform
import pty
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from common.testing.stack import Stack


def run(stack: Stack, script: str, *flags: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in a container of its own."""
    name = f"r{uuid.uuid4().hex[:8]}"
    return stack.ctr("run", "--rm", "--runtime", RUNTIME, *flags, IMAGE, name, "sh", "-c", script, stdin=stdin)


def test_runs_another_kernel_and_keeps_the_streams_apart(stack: Stack) -> None:
    result = run(stack, "uname -r; echo to-stderr >&2")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert result.stdout.decode().strip() != platform.release()
    assert result.stderr == b"to-stderr\n"


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 137), ("kill -15 $$", 143), ("true", 0)])
def test_exit_status_is_exact(stack: Stack, script: str, status: int) -> None:
    # Process 1 of a pid namespace ignores signals that it sends itself: a child is killed, its status passed on.
    assert run(stack, f"sh -c '{script}'; exit $?").returncode == status


def test_stdin_reaches_the_process_and_ends(stack: Stack) -> None:
    data = os.urandom(256 << 10)
    result = run(stack, "sha256sum; echo end", stdin=data)
    assert result.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  -\nend\n"


def test_binary_output_is_intact(stack: Stack) -> None:
    result = run(stack, "head -c 4194304 /dev/urandom > /tmp/x; cat /tmp/x; sha256sum /tmp/x >&2")
    assert len(result.stdout) == 4 << 20
    assert result.stderr.decode().split()[0] == hashlib.sha256(result.stdout).hexdigest()


def test_a_missing_program_is_named(stack: Stack) -> None:
    result = stack.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, "missing", "/no/such/program")
    assert result.returncode != 0
    assert b"/no/such/program" in result.stderr
    stack.ctr("container", "rm", "missing")


def test_what_the_container_writes_is_in_its_snapshot(stack: Stack) -> None:
    name = f"r{uuid.uuid4().hex[:8]}"
    stack.ctr("run", "--runtime", RUNTIME, IMAGE, name, "sh", "-c", "echo kept > /root/file", check=True)
    mounts = stack.ctr("snapshot", "mounts", str(stack.root / "m"), name)
    upper = mounts.stdout.decode().split("upperdir=")[1].split(",")[0]
    with open(f"{upper}/root/file") as file:  # noqa: PTH123
        assert file.read() == "kept\n"
    stack.ctr("container", "rm", name, check=True)


def test_a_terminal_is_a_terminal(stack: Stack) -> None:
    ours, theirs = pty.openpty()
    command = stack.ctr_argv(
        "run", "--rm", "-t", "--runtime", RUNTIME, IMAGE, "term", "sh", "-c", "tty; read x; echo got:$x"
    )
    with subprocess.Popen(command, env=stack.environment, stdin=theirs, stdout=theirs, stderr=theirs) as ctr:
        os.close(theirs)
        os.write(ours, b"typed\n")
        seen = b""
        while b"got:typed" not in seen:
            seen += os.read(ours, 4096)
        assert b"/dev/pts/0" in seen
        assert ctr.wait(60) == 0
    os.close(ours)


def test_three_at_once(stack: Stack) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda n: run(stack, f"echo {n}; exit {n}"), range(3)))
    seen = [(r.stdout, r.returncode, r.stderr) for r in results]
    assert seen == [(b"0\n", 0, b""), (b"1\n", 1, b""), (b"2\n", 2, b"")]


@pytest.mark.soak
def test_thirty_one_after_another(stack: Stack) -> None:
    for number in range(30):
        assert run(stack, f"exit {number}").returncode == number
        assert stack.remains() == []
