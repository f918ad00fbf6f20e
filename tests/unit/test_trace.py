"""Named points: nothing without the variable, the end of the process with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from common.trace import VARIABLE

PROGRAM = "from common.trace import reach\nfor _ in range(2): reach('a:b'); print('passed', flush=True)"


def run(value: str) -> tuple[int, int]:
    """Run a program that passes a point twice; return its exit status and how often it passed."""
    environment = {**os.environ, VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=False)
    return done.returncode, done.stdout.count(b"passed")


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("", (0, 2)),
        ("other:kill", (0, 2)),
        ("a:b:kill", (-signal.SIGKILL, 0)),
        ("other:kill,a:b:kill:2", (-signal.SIGKILL, 1)),
        ("a:b", (1, 0)),
        ("a:b:kill:x", (1, 0)),
    ],
)
def test_a_point_is_fatal_only_if_it_is_named(value: str, outcome: tuple[int, int]) -> None:
    assert run(value) == outcome
