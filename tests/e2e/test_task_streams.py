"""Standard streams under stress: sizes, numbers, readers that stall, clients that vanish."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import execute, new_name, running
from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.stack import Stack

_CHUNK = 1 << 20
_ODD_CHUNK = _CHUNK - 3


def sizes(gate: int, soak: int) -> pytest.MarkDecorator:
    """Test with a size for each day and with one for a long night."""
    return pytest.mark.parametrize("size", [gate, pytest.param(soak, marks=pytest.mark.soak)])


def chunks(size: int) -> Iterator[bytes]:
    """Yield so many bytes, of which no two chunks are the same."""
    for start in range(0, size, _CHUNK):
        yield hashlib.shake_128(start.to_bytes(8, "big")).digest(min(_CHUNK, size - start))


def start(stack: Stack, *arguments: str, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start `ctr`; whoever calls reads its standard output."""
    return subprocess.Popen(stack.ctr_argv(*arguments), env=stack.environment, stdin=stdin, stdout=subprocess.PIPE)


@sizes(gate=8, soak=1024)
def test_output_of_any_size_is_intact(stack: Stack, size: int) -> None:
    """So many times a chunk of a size that fits no frame: what is lost, doubled or swapped shows."""
    script = (
        f"cd /run; head -c {_ODD_CHUNK} /dev/urandom > chunk; cat chunk;"
        f" i=1; while [ $i -lt {size} ]; do cat chunk; i=$((i+1)); done"
    )
    command = ("run", "--rm", "--runtime", RUNTIME, IMAGE, new_name(), "sh", "-c", script)
    with start(stack, *command) as ctr:
        assert ctr.stdout is not None
        chunk = ctr.stdout.read(_ODD_CHUNK)
        for _ in range(size - 1):
            assert ctr.stdout.read(_ODD_CHUNK) == chunk
        assert ctr.stdout.read() == b""
    assert ctr.returncode == 0


@sizes(gate=2 << 20, soak=64 << 20)
def test_input_of_any_size_is_intact(stack: Stack, size: int) -> None:
    command = ("run", "--rm", "--runtime", RUNTIME, IMAGE, new_name(), "sha256sum")
    with start(stack, *command, stdin=subprocess.PIPE) as ctr:
        assert ctr.stdin is not None
        assert ctr.stdout is not None
        sent = hashlib.sha256()
        for chunk in chunks(size):
            ctr.stdin.write(chunk)
            sent.update(chunk)
        ctr.stdin.close()
        assert ctr.stdout.read().decode().split()[0] == sent.hexdigest()
    assert ctr.returncode == 0


@sizes(gate=10, soak=200)
def test_short_execs_in_a_row(stack: Stack, size: int) -> None:
    with running(stack) as name:
        for number in range(size):
            check_exec(stack, name, number)


def test_twenty_execs_at_once(stack: Stack) -> None:
    """They want more stream ports than there are, so some wait for others."""
    with running(stack) as name, ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: check_exec(stack, name, number), range(20)))


def check_exec(stack: Stack, name: str, number: int) -> None:
    done = execute(stack, name, "sh", "-c", f"echo out {number}; echo err {number} >&2; exit {number % 100}")
    seen = (done.returncode, done.stdout.decode(), done.stderr.decode())
    assert seen == (number % 100, f"out {number}\n", f"err {number}\n")


def test_a_reader_that_stalls_stops_its_own_process_and_loses_nothing(stack: Stack) -> None:
    size = 32 << 20
    with running(stack) as name:
        script = f"yes | head -c {size}; echo done > /run/done"
        with start(stack, "task", "exec", "--exec-id", "slow", name, "sh", "-c", script) as slow:
            assert slow.stdout is not None
            assert slow.stdout.read(2) == b"y\n"
            for number in range(3):
                check_exec(stack, name, number)
            assert execute(stack, name, "test", "-e", "/run/done").returncode == 1, "it has stopped with its reader"
            assert len(slow.stdout.read()) == size - 2
        assert execute(stack, name, "cat", "/run/done").stdout == b"done\n"


def test_input_that_is_not_read_stops_its_own_client_and_is_not_lost(stack: Stack) -> None:
    data = b"".join(chunks(32 << 20))
    script = "until [ -e /run/go ]; do sleep 0.1; done; sha256sum"
    with running(stack) as name, ThreadPoolExecutor(1) as pool:
        command = ("task", "exec", "--exec-id", "slow", name, "sh", "-c", script)
        with start(stack, *command, stdin=subprocess.PIPE) as slow:
            assert slow.stdin is not None
            assert slow.stdout is not None
            written = pool.submit(slow.stdin.write, data)
            for number in range(3):
                check_exec(stack, name, number)
            has_stopped = not written.done()
            execute(stack, name, "touch", "/run/go")
            written.result()
            slow.stdin.close()
            assert slow.stdout.read().decode().split()[0] == hashlib.sha256(data).hexdigest()
        assert has_stopped


def test_a_client_that_vanishes_leaves_a_container_that_can_be_ended(stack: Stack) -> None:
    name = new_name()
    with start(stack, "run", "--runtime", RUNTIME, IMAGE, name, "yes") as ctr:
        assert ctr.stdout is not None
        assert ctr.stdout.read(2) == b"y\n"
        os.kill(ctr.pid, signal.SIGKILL)
    check_exec(stack, name, 1)
    stack.ctr("task", "rm", "-f", name, check=True)
    stack.ctr("container", "rm", name, check=True)


def test_the_client_of_an_exec_that_vanishes_costs_nobody_else_anything(stack: Stack) -> None:
    with running(stack) as name:
        with start(stack, "task", "exec", "--exec-id", "lost", name, "yes") as ctr:
            assert ctr.stdout is not None
            assert ctr.stdout.read(2) == b"y\n"
            os.kill(ctr.pid, signal.SIGKILL)
        for number in range(3):
            check_exec(stack, name, number)
        stack.ctr("task", "kill", "-s", "SIGKILL", "--exec-id", "lost", name, check=True)
