"""What a guest printed, made fit to be shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from procs.vmm_manager.drivers import TAIL_SIZE
from procs.vmm_manager.drivers.qemu.console import read_tail, readable

if TYPE_CHECKING:
    from pathlib import Path


def test_a_guest_cannot_command_the_readers_terminal() -> None:
    shown = readable(b"\x1b]0;owned\x07\x1b[2Jhello\r\nworld\r\x00\n")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\r" not in shown
    assert "hello\nworld" in shown


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert readable(b"a\xff\xfeb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_only_the_tail_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"end")
    assert len(read_tail(log)) == TAIL_SIZE
    assert read_tail(log).endswith("xend")
    assert read_tail(tmp_path / "none") == ""
