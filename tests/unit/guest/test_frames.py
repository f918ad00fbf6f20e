"""Frames of output, made from real pipes; the port is a pipe too."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.channel import WINDOW, StreamDecoder
from guest.agent import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAM = 0x105
_F_SETPIPE_SZ = 1031


class Ends:
    """A process's pipe, and a port."""

    def __init__(self, flags: int = 0) -> None:
        self.source, self.process = os.pipe2(os.O_NONBLOCK | flags)
        self.host, self.port = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(self.process, _F_SETPIPE_SZ, 1 << 20)
        self.decoder = StreamDecoder(STREAM)

    def received(self) -> bytes:
        """What the host has got since it was asked last."""
        data = b""
        try:
            while chunk := os.read(self.host, 1 << 20):
                data += chunk
        except BlockingIOError:
            pass
        return b"".join(self.decoder.feed(data))

    def close(self) -> None:
        for fd in (self.source, self.process, self.host, self.port):
            os.close(fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def spliced(stream: int, on_much: Callable[[], None] = lambda: None) -> frames.SplicedFrames:
    return frames.SplicedFrames(stream, on_much)


def carry(made: frames.CopiedFrames, ends: Ends) -> bytes:
    """Send what is in the process's pipe, whenever the port takes some; return what the host gets."""
    got = b""
    with contextlib.suppress(BlockingIOError):
        while made.fill(ends.source):
            while not sends(made, ends.port):
                got += ends.received()
    return got + ends.received()


def sends(made: frames.CopiedFrames, port: int) -> bool:
    try:
        made.send(port)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("kind", [frames.CopiedFrames, spliced])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65536, 300_001, 1 << 20])
def test_what_the_process_writes_comes_whole(ends: Ends, kind: Callable[[int], frames.CopiedFrames], size: int) -> None:
    made = kind(STREAM)
    data = os.urandom(size)
    assert os.write(ends.process, data) == size
    assert carry(made, ends) == data
    assert not ends.decoder.is_ended
    made.end()
    made.send(ends.port)
    assert (ends.received(), ends.decoder.is_ended) == (b"", True)
    made.close()


def test_a_port_that_takes_nothing_gets_the_rest_later(ends: Ends) -> None:
    made = spliced(STREAM)
    data = os.urandom(200_000)
    os.write(ends.process, data)
    assert made.fill(ends.source) == len(data)
    assert not sends(made, ends.port), "a pipe of 64 KiB"
    assert not sends(made, ends.port)
    os.write(ends.process, b"more")
    got = ends.received()
    while not sends(made, ends.port):
        got += ends.received()
    assert got + ends.received() == data
    assert carry(made, ends) == b"more"
    made.close()


def test_more_pieces_than_the_pipe_between_has_places() -> None:
    """A pipe in packet mode has each write in a page of its own."""
    ends = Ends(os.O_DIRECT)
    pieces = [os.urandom(17) for _ in range(256)]
    for piece in pieces:
        os.write(ends.process, piece)
    made = spliced(STREAM)
    assert made.fill(ends.source) == 17 * 256
    got = b""
    while not sends(made, ends.port):
        got += ends.received()
    assert got + ends.received() == b"".join(pieces)
    made.close()
    ends.close()


def test_the_end_of_the_pipe_is_an_empty_frame(ends: Ends) -> None:
    made = spliced(STREAM)
    with pytest.raises(BlockingIOError):
        made.fill(ends.source)
    os.write(ends.process, b"x" * 5000)
    os.close(ends.process)
    assert made.fill(ends.source) == 5000
    made.send(ends.port)
    assert made.fill(ends.source) == 0
    made.send(ends.port)
    assert ends.received() == b"x" * 5000
    assert ends.decoder.is_ended
    ends.process = os.dup(ends.port)
    made.close()


def test_little_output_needs_no_pipe_of_ours(ends: Ends) -> None:
    """An exec that writes a line should not pay for bulk."""
    made = spliced(STREAM)
    os.write(ends.process, b"line\n")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    assert carry(made, ends) == b"line\n"
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    made.close()


def test_a_terminal_is_no_pipe(ends: Ends) -> None:
    master, slave = pty.openpty()
    assert [frames.is_pipe(fd) for fd in (ends.source, master)] == [True, False]
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(("size", "told"), [((64 << 10) - 1, 0), (64 << 10, 1)])
def test_much_output_is_told(ends: Ends, size: int, told: int) -> None:
    calls: list[None] = []
    made = spliced(STREAM, lambda: calls.append(None))
    os.write(ends.process, bytes(size))
    assert made.fill(ends.source) == size
    assert len(calls) == told
    made.close()


def test_what_is_on_its_way_in_pages_is_limited(ends: Ends) -> None:
    made = spliced(STREAM)
    sizes = []

    def carry_a_page_and_more() -> None:
        os.write(ends.process, bytes(300_000))
        sizes.append(made.fill(ends.source))
        while not sends(made, ends.port):
            ends.received()
        with contextlib.suppress(BlockingIOError):
            while made.fill(ends.source):
                while not sends(made, ends.port):
                    ends.received()
        ends.received()

    for _ in range(WINDOW // 300_000 + 3):
        carry_a_page_and_more()
    in_pages = sum(size for size in sizes if size > 32 << 10)
    assert WINDOW - 4096 < in_pages <= WINDOW
    assert sizes[-1] < 32 << 10, "the rest goes by copies, for which the port has an end"
    made.allow(300_000)
    carry_a_page_and_more()
    assert sizes[-1] == 300_000
    os.write(ends.process, bytes(9000))
    with contextlib.suppress(frames.WindowClosedError):
        while made.fill(ends.source):
            made.send(ends.port)
    with pytest.raises(frames.WindowClosedError):
        made.fill(ends.source)
    made.allow(9000)
    assert made.fill(ends.source) > 0
    made.close()
