"""What VMMs write in lines: cut anywhere, too long, too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from procs.vmm_manager.drivers.lines import MAX_LINE, Lines, Relay


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.integers(1, 7))
def test_lines_are_the_same_in_whatever_pieces_they_come(written: list[bytes], size: int) -> None:
    taken: list[bytes] = []
    lines = Lines(taken.append)
    data = b"".join(line + b"\n" for line in written)
    for begin in range(0, len(data), size):
        lines.feed(data[begin : begin + size])
    assert taken == written


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_a_line_without_end_takes_no_memory_and_the_next_one_is_read(size: int) -> None:
    taken: list[bytes] = []
    lines = Lines(taken.append)
    data = b"first\n" + b"x" * (3 * MAX_LINE) + b"\nlast\n"
    for begin in range(0, len(data), size):
        lines.feed(data[begin : begin + size])
        assert len(lines._rest) <= MAX_LINE
    assert taken == [b"first", b"last"]


def test_so_many_lines_a_minute_are_logged_and_the_others_counted() -> None:
    now = 0.0
    with capture_logs() as logged:
        relay = Relay("s1", "a VMM", lambda: now)
        for number in range(250):
            relay.take(f"line {number}".encode())
        assert [record["said"] for record in logged] == [f"line {number}" for number in range(100)]
        now = 61.0
        relay.take(b"afterwards")
    assert logged[-2]["lines"] == 150
    assert logged[-1] == {
        "event": "the VMM says",
        "log_level": "warning",
        "sandbox": "s1",
        "vmm": "a VMM",
        "said": "afterwards",
    }


def test_what_is_logged_is_short_and_commands_no_terminal() -> None:
    with capture_logs() as logged:
        Relay("s1", "a VMM", lambda: 0.0).take(b"\x1b[2J" + b"x" * 10_000)
    assert len(logged[0]["said"]) <= 1024
    assert "\x1b" not in logged[0]["said"]
