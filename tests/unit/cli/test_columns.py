"""Text in columns."""

from __future__ import annotations

import pytest

from procs.cli.columns import age, aligned, moment


def test_cells_stand_below_one_another_and_nothing_is_seen() -> None:
    assert aligned([("A", "LONG", "C"), ("aaa", "", "c")]) == "A    LONG  C\naaa  -     c"


def test_what_a_terminal_would_obey_is_not_sent_to_it() -> None:
    assert aligned([("/dev/\x1b[31mred\n\u202e",)]) == "/dev/?[31mred??"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (0, "0s"), (61, "1m 1s"), (7200, "2h"), (90061, "1d 1h"), (86400.5, "1d")]
)
def test_an_age_has_two_units_at_most(seconds: float, text: str) -> None:
    assert age(1000.0, 1000.0 + seconds) == text


def test_a_moment_has_milliseconds() -> None:
    assert moment(1.25) == "1970-01-01T00:00:01.250Z"
