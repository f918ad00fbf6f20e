"""Cloud Hypervisor's event stream: whole, in pieces, cut, and full of something else."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procs.vmm_manager.drivers.cloud_hypervisor.events import LOST, Decoder, Event


def record(source: str, name: str, device_id: str = "") -> bytes:
    """Return a record as Cloud Hypervisor writes it: pretty-printed, then an empty line."""
    properties = {"id": device_id, "bdf": "0000:00:03.0"} if device_id else None
    fields = {"timestamp": {"secs": 1, "nanos": 2}, "source": source, "event": name, "properties": properties}
    return json.dumps(fields, indent=2).encode() + b"\n\n"


REMOVED = Event("vm", "device-removed", "_disk1")
BOOTED = Event("vm", "booted")
STREAM = record("vm", "booted") + record("vm", "device-removed", "_disk1") + record("virtio-device", "reset", "_fs2")
EVENTS = [BOOTED, REMOVED, Event("virtio-device", "reset", "_fs2")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    decoder = Decoder()
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in itertools.pairwise(edges)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == EVENTS


@pytest.mark.parametrize(
    ("bytes_", "events"),
    [
        (record("vm", "booted")[:40] + record("vm", "device-removed", "_disk1"), [LOST, REMOVED]),
        (b"no record\n\n" + record("vm", "booted"), [LOST, BOOTED]),
        (b'{\n  "timestamp": {\n    "secs": }\n\n' + record("vm", "booted"), [LOST, BOOTED]),
        (b'{\n  "timestamp": 1,\n  "properties": 5\n}\n\n' + record("vm", "booted"), [LOST, BOOTED]),
        (b"\n\n" + record("vm", "booted"), [LOST, BOOTED]),
        (b"\xff\xfe" * 10 + b"\n\n", [LOST]),
    ],
)
def test_begins_anew_after_what_is_no_record_and_says_so(bytes_: bytes, events: list[Event]) -> None:
    assert list(Decoder().feed(bytes_)) == events


@given(st.binary(max_size=300))
def test_nothing_keeps_the_next_record_from_being_read(noise: bytes) -> None:
    decoder = Decoder()
    list(decoder.feed(noise))
    assert list(decoder.feed(b"\n\n" + record("vm", "device-removed", "_disk1")))[-1] == REMOVED


def test_a_record_without_an_end_is_not_kept() -> None:
    decoder = Decoder()
    assert list(decoder.feed(b"x" * 40000)) == [LOST]
    assert list(decoder.feed(record("vm", "booted"))) == [BOOTED]
