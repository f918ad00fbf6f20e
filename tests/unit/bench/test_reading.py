"""What the benchmark reads out of a guest's console and out of the kernel's accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import memory, phases, run, streams

if TYPE_CHECKING:
    from pathlib import Path

_SMAPS = """\
00400000-00720000 r-xp 00000000 fe:00 1 /usr/bin/python3.11
Size:               3200 kB
Pss:                1500 kB
Pss_Dirty:             0 kB
VmFlags: rd ex mr
00720000-00730000 rw-p 00320000 fe:00 1 /usr/bin/python3.11
Pss:                  64 kB
00a00000-00b00000 rw-p 00000000 00:00 0 [heap]
Pss:                 900 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Pss:                 700 kB
"""


def test_memory_is_added_up_by_mapping() -> None:
    assert memory._parse(_SMAPS) == [("python3.11", 1564), ("[heap]", 900), ("anonymous", 700)]


def test_marks_are_the_scripts_and_the_agents() -> None:
    console = (
        "[    0.1] a line of the kernel\r\n"
        "bench python 1.9388\r\n"
        '{"t": "2.154", "level": "info", "event": "agent is up", "port": "/dev/vport0p1"}\r\n'
    )
    assert phases._marks(console) == {"python": 1.9388, "up": 2.154}


def test_peers_take_turns_and_the_first_round_does_not_count() -> None:
    taken: list[str] = []

    def measure(what: str) -> float:
        taken.append(what)
        return float(len(taken))

    samples = run.interleaved({"a": lambda: measure("a"), "b": lambda: measure("b")})
    assert taken == ["a", "b"] * (run._ROUNDS + 1)
    assert samples["a"] == [float(2 * number + 1) for number in range(1, run._ROUNDS + 1)]


def test_the_ratios_compare_what_was_measured_in_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    run.report(
        {
            run._BOOT: [2.0, 5.0, 2.0],
            run._OWN_BOOT: [2.0, 5.5, 8.0],
            run._RUN: [3.0, 6.0, 9.0],
            run._RUNC_RUN: [0.1, 0.4, 0.1],
            run._CRUN_RUN: [0.4, 0.1, 0.9],
            run._EXEC: [0.3, 0.3, 0.9],
            run._RUNC_EXEC: [0.1, 0.1, 0.1],
            run._CRUN_EXEC: [0.2, 0.2, 0.2],
        }
    )
    printed = capsys.readouterr().out
    assert "(runc: ctr run + crun run in the guest) = 1.000 (1.000 to 7.000) / 0.500 = 2.00\n" in printed
    assert "(runc: ctr run + crun run in the guest) = 1.000 (0.500 to 1.000) / 0.500 = 2.00\n" in printed
    assert "(bare boot to agent answers) = 5.500 (2.000 to 8.000) / 2.000 = 2.75\n" in printed
    assert "(runc: ctr task exec + crun exec in the guest) = 0.300 (0.300 to 0.900) / 0.300 = 1.00\n" in printed


def test_output_is_read_to_its_last_byte_and_not_beyond() -> None:
    blocks = iter([bytes(streams.SIZE - 5), bytes(5), b"beyond"])
    streams.seconds(lambda _size: next(blocks))
    assert next(blocks) == b"beyond"


def test_output_that_ends_too_soon_is_no_measurement() -> None:
    blocks = iter([b"some", b""])
    with pytest.raises(ValueError, match="4 bytes came"):
        streams.seconds(lambda _size: next(blocks))


def test_a_log_is_read_by_request(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "containerd's own line\n"
        '{"event": "sandbox phase", "phase": "running", "request": "a", "timestamp": "2026-11-30T20:00:09.000000Z"}\n'
        '{"event": "sandbox phase", "phase": "booting", "request": "b", "timestamp": "2026-11-30T20:00:02.000000Z"}\n'
        '{"event": "sandbox phase", "phase": "booting", "request": "a", "timestamp": "2026-11-30T20:00:03.500000Z"}\n'
        '{"event": "shim ends", "timestamp": "2026-11-30T20:00:04.000000Z"}\n'
    )
    times = run._times(log, event="sandbox phase", phase="booting")
    assert list(times) == ["b", "a"]
    assert times["a"] - times["b"] == 1.5
