"""Containers of a :class:`common.testing.stack.Stack`, as tests and benchmarks use them."""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from common.testing.stack import Stack


@contextmanager
def running(stack: Stack, script: str = "exec sleep 1000", runtime: str = RUNTIME) -> Iterator[str]:
    """A detached container; killed and removed at the end."""
    name = f"t{uuid.uuid4().hex[:8]}"
    stack.ctr("run", "-d", "--runtime", runtime, IMAGE, name, "sh", "-c", script, check=True)
    try:
        yield name
    finally:
        stack.ctr("task", "rm", "-f", name)
        stack.ctr("container", "rm", name)


def execute(stack: Stack, name: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a container, by `ctr task exec`."""
    return stack.ctr("task", "exec", "--exec-id", uuid.uuid4().hex[:8], name, *command)
