"""`ctr run --log-uri`: output that nobody reads goes to a file or to a program that logs, as with runc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.testing.containers import new_name
from common.testing.stack import IMAGE, RUNTIME

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


def log(stack: Stack, events: Iterator[Envelope], runtime: str, uri: str) -> str:
    """Run a container to its end and delete it; its output goes to ``uri``. Return its name."""
    name, script = new_name(), "echo out; echo err >&2"
    stack.ctr("run", "-d", "--runtime", runtime, "--log-uri", uri, IMAGE, name, "sh", "-c", script, check=True)
    next(envelope for envelope in events if envelope.topic == "/tasks/exit")
    stack.ctr("task", "rm", name, check=True)
    stack.ctr("container", "rm", name, check=True)
    return name


def test_output_goes_to_a_file(stack: Stack, runtime: str, tmp_path: Path, task_events: Iterator[Envelope]) -> None:
    log(stack, task_events, runtime, f"file://{tmp_path}/deep/log")
    assert sorted((tmp_path / "deep/log").read_text().splitlines()) == ["err", "out"]


@pytest.mark.parametrize("query", ["", "?colour=red"])
def test_output_goes_to_a_program(stack: Stack, tmp_path: Path, query: str, task_events: Iterator[Envelope]) -> None:
    """Not beside runc, whose shim ends the program before it has read everything."""
    program = tmp_path / "logger"
    program.write_text(LOGGER.format(directory=tmp_path))
    program.chmod(0o755)
    name = log(stack, task_events, RUNTIME, f"binary://{program}{query}")
    assert [(tmp_path / file).read_text() for file in ("out", "err")] == ["out\n", "err\n"]
    assert (tmp_path / "who").read_text().split() == ["default", name, *(["colour", "red"] if query else [])]
