"""Containers of a :class:`common.testing.stack.Stack`, as tests and benchmarks use them."""

from __future__ import annotations

import select
import subprocess
import uuid
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.stack import Stack

RUNC = "io.containerd.runc.v2"
"""The reference: what a user of containers knows. A test that it fails is a wrong test."""

_TIMEOUT_S = 150.0


def new_name() -> str:
    """Return a container id that nobody on this host has used: ids are unique per host."""
    return f"t{uuid.uuid4().hex[:8]}"


def run(
    stack: Stack, script: str, *flags: str, runtime: str = RUNTIME, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in a container of its own."""
    return stack.ctr("run", "--rm", "--runtime", runtime, *flags, IMAGE, new_name(), "sh", "-c", script, stdin=stdin)


@contextmanager
def running(stack: Stack, script: str = "exec sleep 1000", *flags: str, runtime: str = RUNTIME) -> Iterator[str]:
    """A detached container that runs a shell script; killed and removed at the end."""
    name = new_name()
    stack.ctr("run", "-d", "--runtime", runtime, *flags, IMAGE, name, "sh", "-c", script, check=True)
    try:
        yield name
    finally:
        stack.ctr("task", "rm", "-f", name)
        stack.ctr("container", "rm", name)


class Attached:
    """A container that `ctr run` is attached to, and its streams.

    Attributes:
        name: the container's id.
        ctr: the client's process.
    """

    def __init__(self, name: str, ctr: subprocess.Popen[bytes]) -> None:
        assert ctr.stdin is not None
        assert ctr.stdout is not None
        self.name = name
        self.ctr = ctr
        self._stdin: IO[bytes] = ctr.stdin
        self._stdout: IO[bytes] = ctr.stdout

    def write_line(self, text: str) -> None:
        """Write a line to the container's standard input."""
        self._stdin.write(f"{text}\n".encode())

    def end_input(self) -> None:
        """Let the container's standard input end."""
        self._stdin.close()

    def read_line(self) -> str:
        """Wait for a line of the container's standard output; empty at its end."""
        is_ready, _, _ = select.select([self._stdout], [], [], _TIMEOUT_S)
        assert is_ready, f"{self.name} printed nothing for {_TIMEOUT_S} s"
        return self._stdout.readline().decode().removesuffix("\n")

    def wait(self) -> int:
        """Wait for the client's end; return its exit code, which is the container's."""
        return self.ctr.wait(_TIMEOUT_S)


@contextmanager
def attached(stack: Stack, script: str, *flags: str, runtime: str = RUNTIME) -> Iterator[Attached]:
    """A container that runs a shell script with `ctr run --rm` attached to it; killed and removed at the end."""
    name = new_name()
    with _client(stack, name, "run", "--rm", "--runtime", runtime, *flags, IMAGE, name, "sh", "-c", script) as client:
        yield client


@contextmanager
def attached_to(stack: Stack, name: str) -> Iterator[Attached]:
    """A container that runs already, with `ctr task attach` attached to it; killed at the end."""
    with _client(stack, name, "task", "attach", name) as client:
        yield client


@contextmanager
def _client(stack: Stack, name: str, *arguments: str) -> Iterator[Attached]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        stack.ctr_argv(*arguments), bufsize=0, env=stack.environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as ctr:
        try:
            yield Attached(name, ctr)
        finally:
            if ctr.poll() is None:
                stack.ctr("task", "kill", "-s", "SIGKILL", name)
                ctr.wait(_TIMEOUT_S)


def execute(stack: Stack, name: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a container, by `ctr task exec`."""
    return stack.ctr("task", "exec", "--exec-id", new_name(), name, *command)


def status(stack: Stack, name: str) -> str:
    """Return what `ctr task ls` says of a container: RUNNING, STOPPED; empty if it has no task."""
    rows = [line.split() for line in stack.ctr("task", "ls", check=True).stdout.decode().splitlines()]
    return next((row[2] for row in rows if row[0] == name), "")
