"""Stream frames: what is picked out of a port's bytes, however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.channel import HEADER, MAX_FRAME, STREAM_PORTS, ChannelError, StreamDecoder, port_of, stream_number

MINE, OTHER = stream_number(7, 3), stream_number(6, 3)
payloads = st.lists(st.tuples(st.sampled_from([MINE, OTHER]), st.binary(min_size=1, max_size=50)), max_size=8)


def frame(stream: int, payload: bytes) -> bytes:
    return HEADER.pack(stream, len(payload)) + payload


def feed_in_pieces(decoder: StreamDecoder, data: bytes, size: int) -> bytes:
    return b"".join(part for at in range(0, len(data), size) for part in decoder.feed(data[at : at + size]))


@given(payloads, st.integers(1, 64))
def test_only_the_stream_of_this_use_is_read(sent: list[tuple[int, bytes]], size: int) -> None:
    decoder = StreamDecoder(MINE)
    data = b"".join(frame(stream, payload) for stream, payload in sent) + frame(OTHER, b"")
    assert feed_in_pieces(decoder, data, size) == b"".join(payload for stream, payload in sent if stream == MINE)
    assert not decoder.is_ended
    assert feed_in_pieces(decoder, frame(MINE, b"") + frame(MINE, b"late"), size) == b""
    assert decoder.is_ended


@given(st.integers(1, 11))
def test_the_next_use_begins_behind_half_a_frame_of_the_last(cut: int) -> None:
    decoder = StreamDecoder(OTHER)
    last = frame(OTHER, b"old")
    assert b"".join(decoder.feed(last[:cut])) == b"old"[: max(0, cut - HEADER.size)]
    assert decoder.is_between_frames == (cut == len(last))
    decoder.begin(MINE)
    assert b"".join(decoder.feed(last[cut:] + frame(MINE, b"new"))) == b"new"


def test_a_frame_that_is_too_long_is_refused() -> None:
    with pytest.raises(ChannelError, match="frame of 524289 bytes"):
        list(StreamDecoder(MINE).feed(HEADER.pack(OTHER, MAX_FRAME + 1)))


@given(st.integers(1, (1 << 24) - 1), st.integers(0, STREAM_PORTS - 1))
def test_a_stream_number_names_its_port_and_use(generation: int, port: int) -> None:
    number = stream_number(generation, port)
    assert (port_of(number), number >> 8) == (port, generation)
    assert 0 < number < 1 << 32


@pytest.mark.parametrize(("generation", "port"), [(0, 0), (1 << 24, 0), (1, -1), (1, STREAM_PORTS)])
def test_a_number_that_names_nothing_is_refused(generation: int, port: int) -> None:
    with pytest.raises(ValueError, match=f"no stream port {port} in generation {generation}"):
        stream_number(generation, port)


def test_a_port_that_no_vm_has_is_refused() -> None:
    with pytest.raises(ChannelError, match=f"names port {STREAM_PORTS}; a VM has {STREAM_PORTS}"):
        port_of(1 << 8 | STREAM_PORTS)
