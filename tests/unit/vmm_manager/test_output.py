"""What processes and guests print: bounded, and fit to be shown."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from common.testing.isolation import in_event_loop
from procs.vmm_manager.drivers import TAIL_SIZE
from procs.vmm_manager.drivers.output import Output, readable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLOOD = f"i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo {'x' * 99}; done 2>/dev/null; exit 7"


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    made = Output(tmp_path / "log")
    yield made
    if made.fd >= 0:
        made.close()


def test_a_guest_cannot_command_the_readers_terminal() -> None:
    shown = readable(b"\x1b]0;owned\x07\x1b[2Jhello\r\nworld\r\x00\n")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\r" not in shown
    assert "hello\nworld" in shown


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert readable(b"a\xff\xfeb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_only_the_tail_is_shown(output: Output) -> None:
    os.write(output.fd, b"x" * 10_000 + b"end")
    assert len(output.tail()) == TAIL_SIZE
    assert output.tail().endswith("xend")


def test_nothing_was_printed(output: Output) -> None:
    assert output.tail() == ""


def test_the_last_words_outlive_the_process_and_the_listener(output: Output) -> None:
    subprocess.run(["/bin/echo", "farewell"], stdout=output.fd, check=True)
    output.close()
    assert output.tail() == "farewell\n"


def test_a_process_that_prints_for_ever_neither_waits_nor_fills_anything(output: Output, tmp_path: Path) -> None:
    printed = subprocess.run(["/bin/sh", "-c", FLOOD], stdout=output.fd, check=False)
    assert printed.returncode == 7, "it came to its end"
    assert (tmp_path / "log").stat().st_size == 0
    assert output.tail().startswith("x")


def test_another_manager_finds_it_by_name(output: Output, tmp_path: Path) -> None:
    os.write(output.fd, b"said before")
    second = Output(tmp_path / "log")
    assert second.tail() == "said before"
    second.close()


@in_event_loop
async def test_of_an_output_that_is_followed_the_last_words_are_known(output: Output) -> None:
    output.follow()
    for _ in range(5):
        os.write(output.fd, b"x" * (60 << 10))
        await asyncio.sleep(0)  # the loop looks once at what can be read
        await asyncio.sleep(0)
    os.write(output.fd, b"\nthe last words\n")
    assert output.tail().endswith("\nthe last words\n")
    output.close()
    assert output.tail().endswith("\nthe last words\n")
