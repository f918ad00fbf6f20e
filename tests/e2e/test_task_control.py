"""`ctr task` on a running container: what acts on all of it. runc must pass it too, but for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.testing.containers import execute, new_name, running, status
from common.testing.stack import IMAGE

if TYPE_CHECKING:
    from common.testing.stack import Stack


pytestmark = pytest.mark.containerd


def test_pause_and_resume(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        stack.ctr("task", "pause", name, check=True)
        assert status(stack, name) == "PAUSED"
        refused = execute(stack, name, "true")
        assert refused.returncode == 1
        assert b"cannot exec in a paused state" in refused.stderr
        stack.ctr("task", "resume", name, check=True)
        assert status(stack, name) == "RUNNING"
        assert execute(stack, name, "echo", "again").stdout == b"again\n"


def test_a_paused_container_is_removed(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        stack.ctr("task", "pause", name, check=True)
        stack.ctr("task", "rm", "-f", name, check=True)
        assert status(stack, name) == ""


def test_a_checkpoint_is_refused_and_the_container_goes_on(stack: Stack) -> None:
    with running(stack) as name:
        said = stack.ctr("task", "checkpoint", "--image-path", str(stack.root / "image"), name)
        assert said.returncode == 1
        assert b"cannot be checkpointed" in said.stderr
        assert status(stack, name) == "RUNNING"


def test_metrics(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        told = stack.ctr("task", "metrics", "--format", "json", name, check=True).stdout.decode()
        assert '"pids":{"current":1' in "".join(told.split())
        table = stack.ctr("task", "metrics", name, check=True).stdout.decode()
        assert "memory.usage" in table


def test_memory_that_runs_out(stack: Stack, runtime: str) -> None:
    limit = ("--memory-limit", str(24 << 20))
    result = stack.ctr("run", "--rm", "--runtime", runtime, *limit, IMAGE, new_name(), "tail", "/dev/zero")
    assert result.returncode == 137
