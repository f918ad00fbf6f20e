"""`ctr run --log-uri`: output that nobody reads goes to a file or to a program that logs, as with runc."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import pytest

from common.protocols.events import TaskExit
from common.testing.containers import new_name, running
from common.testing.stack import IMAGE, RUNTIME, tail_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from common.protocols.events import Envelope
    from common.testing.stack import Stack

pytestmark = pytest.mark.containerd

LOGGER = """#!/bin/sh
exec 5>&-
cat <&3 > {directory}/out &
cat <&4 > {directory}/err &
wait
echo $CONTAINER_NAMESPACE $CONTAINER_ID "$@" > {directory}/who
"""


def log(stack: Stack, events: Iterator[Envelope], uri: str) -> str:
    """Run a container of ours to its end and delete it; its output goes to ``uri``. Return its name."""
    name, script = new_name(), "echo out; echo err >&2"
    stack.ctr("run", "-d", "--runtime", RUNTIME, "--log-uri", uri, IMAGE, name, "sh", "-c", script, check=True)
    next(event for event in events if event.topic == TaskExit.TOPIC and container_of(event) == name)
    stack.ctr("task", "rm", name, check=True)
    stack.ctr("container", "rm", name, check=True)
    return name


def container_of(event: Envelope) -> str:
    """Return whose exit an event tells: that of an earlier test's container may come late."""
    assert event.event is not None
    return TaskExit.decode(event.event.value).container_id


def test_output_goes_to_a_file(stack: Stack, runtime: str, tmp_path: Path) -> None:
    file = tmp_path / "deep/log"
    script = "echo out; echo err >&2; exec sleep 1000"
    with running(stack, script, "--log-uri", f"file://{file}", runtime=runtime), tail_of(file) as lines:
        assert sorted(islice(lines, 2)) == ["err\n", "out\n"]


def test_a_file_has_what_was_said_last(stack: Stack, tmp_path: Path, task_events: Iterator[Envelope]) -> None:
    """Not beside runc, whose shim closes the file when one of the streams ends (containerd's issue 3118)."""
    log(stack, task_events, f"file://{tmp_path}/log")
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["err", "out"]


@pytest.mark.parametrize("query", ["", "?colour=red"])
def test_output_goes_to_a_program(stack: Stack, tmp_path: Path, query: str, task_events: Iterator[Envelope]) -> None:
    """Not beside runc, whose shim ends the program before it has read everything."""
    program = tmp_path / "logger"
    program.write_text(LOGGER.format(directory=tmp_path))
    program.chmod(0o755)
    name = log(stack, task_events, f"binary://{program}{query}")
    assert [(tmp_path / file).read_text() for file in ("out", "err")] == ["out\n", "err\n"]
    assert (tmp_path / "who").read_text().split() == ["default", name, *(["colour", "red"] if query else [])]
