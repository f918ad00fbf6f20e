"""ttrpc frames: read however they are cut, bounded whatever they announce."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ttrpc.frames import DATA, MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, Request, encode

streams = st.integers(0, (1 << 32) - 1)
kinds = st.sampled_from([REQUEST, RESPONSE, DATA])


def feed_in_pieces(decoder: Decoder, data: bytes, size: int) -> list[Frame]:
    return [frame for at in range(0, len(data), size) for frame in decoder.feed(data[at : at + size])]


@given(st.lists(st.tuples(streams, kinds, st.binary(max_size=40)), max_size=6), st.integers(1, 50))
def test_frames_are_read_however_they_are_cut(sent: list[tuple[int, int, bytes]], size: int) -> None:
    decoder = Decoder()
    data = b"".join(encode(stream, kind, payload) for stream, kind, payload in sent)
    frames = feed_in_pieces(decoder, data, size)
    assert [(frame.stream, frame.type, frame.payload) for frame in frames] == sent
    assert decoder.is_between_frames


@given(st.integers(1, 13))
def test_half_a_frame_is_seen_as_such(cut: int) -> None:
    decoder = Decoder()
    assert not list(decoder.feed(encode(1, REQUEST, b"abcd")[:cut]))
    assert not decoder.is_between_frames


@given(st.integers(1, 1 << 16), st.integers(1, 1000))
def test_a_frame_that_is_too_long_is_skipped_and_reported(excess: int, size: int) -> None:
    decoder = Decoder()
    header = (excess + MAX_PAYLOAD).to_bytes(4, "big") + b"\0\0\0\x05\x01\0"
    (reported,) = decoder.feed(header + bytes(MAX_PAYLOAD))
    assert (reported.stream, reported.payload) == (5, None)
    assert not decoder.is_between_frames
    (following,) = feed_in_pieces(decoder, bytes(excess) + encode(7, REQUEST, b"next"), size)
    assert (following.stream, following.payload) == (7, b"next")


def test_a_payload_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match=f"exceeds ttrpc's limit of {MAX_PAYLOAD}"):
        encode(1, RESPONSE, bytes(MAX_PAYLOAD + 1))


def test_a_request_is_containerds() -> None:
    """Bytes of ``request.proto``: service, method, payload, timeout and metadata in this order of numbers."""
    request = Request(service="s", method="m", payload=b"p", timeout_nano=300)
    assert request.encode() == b"\x0a\x01s\x12\x01m\x1a\x01p\x20\xac\x02"
