"""`ctr task` on a running container: what acts on all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.testing.containers import execute, running
from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from common.testing.stack import Stack


def status(stack: Stack, name: str) -> str:
    """Return what `ctr task ls` says of a container."""
    lines = stack.ctr("task", "ls").stdout.decode().splitlines()
    return next(line.split()[2] for line in lines if line.startswith(name))


def test_pause_and_resume(stack: Stack) -> None:
    with running(stack) as name:
        stack.ctr("task", "pause", name, check=True)
        assert status(stack, name) == "PAUSED"
        assert b"cannot exec in a paused state" in execute(stack, name, "true").stderr
        stack.ctr("task", "resume", name, check=True)
        assert status(stack, name) == "RUNNING"
        assert execute(stack, name, "echo", "again").stdout == b"again\n"


def test_a_paused_container_is_removed(stack: Stack) -> None:
    with running(stack) as name:
        stack.ctr("task", "pause", name, check=True)
        stack.ctr("task", "rm", "-f", name, check=True)


def test_a_checkpoint_is_refused_and_the_container_goes_on(stack: Stack) -> None:
    with running(stack) as name:
        said = stack.ctr("task", "checkpoint", "--image-path", str(stack.root / "image"), name)
        assert said.returncode != 0
        assert b"cannot be checkpointed" in said.stderr
        assert status(stack, name) == "RUNNING"


def test_metrics(stack: Stack) -> None:
    with running(stack) as name:
        told = stack.ctr("task", "metrics", "--format", "json", name, check=True).stdout.decode()
        assert '"pids":{"current":1' in "".join(told.split())
        table = stack.ctr("task", "metrics", name, check=True).stdout.decode()
        assert "memory.usage_in_bytes" in table or "memory.usage" in table


def test_memory_that_runs_out(stack: Stack) -> None:
    name = "hungry"
    said = stack.ctr(
        "run", "--rm", "--runtime", RUNTIME, "--memory-limit", str(24 << 20), IMAGE, name, "tail", "/dev/zero"
    )
    assert said.returncode == 137
