"""A container that goes on: exec, kill, listing, events. runc must pass all of it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.testing.containers import attached, execute, running, status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.protocols.events import Envelope
    from common.testing.stack import Stack


pytestmark = pytest.mark.containerd


def test_exec_has_its_own_streams_and_status(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        for code in range(10):
            result = execute(stack, name, "sh", "-c", f"echo out; echo err >&2; exit {code}")
            assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", code)


def test_exec_sees_the_same_container(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        execute(stack, name, "sh", "-c", "echo hello > /tmp/file")
        assert execute(stack, name, "cat", "/tmp/file").stdout == b"hello\n"  # noqa: S108 - in the container
        assert b"sleep 1000" in execute(stack, name, "ps").stdout


def test_exec_of_a_missing_program_is_an_error_and_harms_nothing(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        missing = execute(stack, name, "/no/such/program")
        assert missing.returncode == 1
        assert b"/no/such/program" in missing.stderr
        assert execute(stack, name, "true").returncode == 0


def test_listing_and_killing(stack: Stack, runtime: str) -> None:
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    with attached(stack, script, runtime=runtime) as container:
        assert container.read_line() == "ready"
        assert status(stack, container.name) == "RUNNING"
        heading, *processes = stack.ctr("task", "ps", container.name, check=True).stdout.splitlines()
        assert heading.split()[0] == b"PID"
        assert processes
        stack.ctr("task", "kill", "-s", "SIGTERM", container.name, check=True)
        assert container.wait() == 7
        assert status(stack, container.name) == ""


def test_errors_read_as_with_runc(stack: Stack, runtime: str) -> None:
    with running(stack, runtime=runtime) as name:
        deleted = stack.ctr("task", "delete", name)
        assert deleted.returncode == 1
        assert b"task must be stopped before deletion: running: failed precondition" in deleted.stderr
        unknown = stack.ctr("task", "kill", "--exec-id", "nope", name)
        assert unknown.returncode == 1
        assert b"not found" in unknown.stderr


def test_events_come_in_containerds_order(stack: Stack, runtime: str, task_events: Iterator[Envelope]) -> None:
    with running(stack, runtime=runtime) as name:
        execute(stack, name, "true")
        stack.ctr("task", "kill", "-s", "SIGKILL", name, check=True)
        topics: list[str] = []
        while topics.count("/tasks/exit") < 2:
            topics.append(next(task_events).topic)
        stack.ctr("task", "rm", name, check=True)
        topics.append(next(task_events).topic)
    assert topics == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ]
