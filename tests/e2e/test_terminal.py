"""Terminals: `ctr run -t` and `ctr task exec -t` under a real one. runc must pass all of it too."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.testing.containers import new_name, running
from common.testing.stack import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.testing.stack import Stack

pytestmark = pytest.mark.containerd

_TIMEOUT_S = 150.0
_ROWS, _COLUMNS = 30, 100
_WINDOW_CHANGES = (  # ctr sets the first size when the process runs, and only then heeds changes
    f"until [ \"$(stty size)\" = '{_ROWS} {_COLUMNS}' ]; do sleep 0.1; done;"
    "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done"
)


class Terminal:
    """A terminal of which ctr has the other end."""

    def __init__(self, master: int, ctr: subprocess.Popen[bytes]) -> None:
        self._master = master
        self._ctr = ctr
        self._unread = b""

    def resize(self, rows: int, columns: int) -> None:
        """Do what a terminal emulator does when its window changes."""
        _set_size(self._master, rows, columns)
        self._ctr.send_signal(signal.SIGWINCH)  # the kernel sends it only to a session that this is the terminal of

    def type(self, text: bytes) -> None:
        """Type a text."""
        os.write(self._master, text)

    def read_until(self, wanted: bytes) -> bytes:
        """Return what is shown up to a text; fail if it does not come."""
        while wanted not in self._unread:
            ready, _, _ = select.select([self._master], [], [], _TIMEOUT_S)
            assert ready, f"{wanted!r} did not come, but {self._unread!r}"
            self._unread += os.read(self._master, 4096)
        shown, _, self._unread = self._unread.partition(wanted)
        return shown + wanted

    def wait(self) -> int:
        """Wait for ctr's end; return its exit code."""
        return self._ctr.wait(_TIMEOUT_S)


@contextmanager
def terminal(stack: Stack, *arguments: str) -> Iterator[Terminal]:
    """Run ctr in a terminal."""
    master, slave = pty.openpty()
    _set_size(master, _ROWS, _COLUMNS)
    with subprocess.Popen(
        stack.ctr_argv(*arguments), env=stack.environment, stdin=slave, stdout=slave, stderr=slave
    ) as ctr:
        try:
            yield Terminal(master, ctr)
        finally:
            ctr.kill()
            os.close(slave)
            os.close(master)


def _set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))  # struct winsize (tty_ioctl(4))


def test_run_with_a_terminal(stack: Stack, runtime: str) -> None:
    script = "tty; read line; echo got:$line; exit 5"
    with terminal(stack, "run", "--rm", "-t", "--runtime", runtime, IMAGE, new_name(), "sh", "-c", script) as shown:
        shown.read_until(b"/dev/pts/0")
        shown.type(b"typed\n")
        shown.read_until(b"got:typed")
        assert shown.wait() == 5


def test_the_interrupt_key_reaches_the_process(stack: Stack, runtime: str) -> None:
    script = "trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.1; done"
    with terminal(stack, "run", "--rm", "-t", "--runtime", runtime, IMAGE, new_name(), "sh", "-c", script) as shown:
        shown.read_until(b"ready")
        shown.type(b"\x03")
        shown.read_until(b"interrupted")
        assert shown.wait() == 6


def test_a_window_that_changes(stack: Stack, runtime: str) -> None:
    name = new_name()
    with terminal(stack, "run", "--rm", "-t", "--runtime", runtime, IMAGE, name, "sh", "-c", _WINDOW_CHANGES) as shown:
        shown.read_until(b"ready")
        shown.resize(41, 123)
        shown.read_until(b"41 123")
        stack.ctr("task", "kill", "-s", "SIGKILL", name, check=True)
        assert shown.wait() == 137


def test_exec_with_a_terminal(stack: Stack, runtime: str) -> None:
    script = "tty; read line; echo got:$line; exit 5"
    with (
        running(stack, runtime=runtime) as name,
        terminal(stack, "task", "exec", "-t", "--exec-id", "tty", name, "sh", "-c", script) as shown,
    ):
        shown.read_until(b"/dev/pts/0")
        shown.type(b"typed\n")
        shown.read_until(b"got:typed")
        assert shown.wait() == 5


def test_the_window_of_an_exec_that_changes(stack: Stack, runtime: str) -> None:
    with (
        running(stack, runtime=runtime) as name,
        terminal(stack, "task", "exec", "-t", "--exec-id", "tty", name, "sh", "-c", _WINDOW_CHANGES) as shown,
    ):
        shown.read_until(b"ready")
        shown.resize(42, 124)
        shown.read_until(b"42 124")
        stack.ctr("task", "kill", "-s", "SIGKILL", "--exec-id", "tty", name, check=True)
        assert shown.wait() == 137
