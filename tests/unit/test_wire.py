"""Bus messages: round trips, and bytes that are no messages."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.bus.wire import MAX_MESSAGE, VERSION, Call, Fault, Reply, decode, encode
from common.errors import KataError, UnsupportedError, WireError, from_wire

CALL = Call(v=VERSION, call_id="c", request_id="r", service="s", verb="x", deadline_ns=1, body={"sandbox_id": "a"})


def test_a_call_survives_the_wire() -> None:
    assert decode(encode(CALL), Call) == CALL


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(KataError):
        decode(data, Call)


def test_another_version_is_refused_with_a_remedy() -> None:
    with pytest.raises(UnsupportedError, match="version 2") as refused:
        decode(msgpack.packb({"v": 2}), Call)
    assert refused.value.hint


def test_unknown_fields_are_ignored() -> None:
    plain = msgpack.unpackb(encode(CALL))
    assert decode(msgpack.packb({**plain, "newer": 1}), Call) == CALL


def test_a_wrong_type_names_its_field() -> None:
    plain = msgpack.unpackb(encode(CALL))
    with pytest.raises(WireError, match="deadline_ns"):
        decode(msgpack.packb({**plain, "deadline_ns": "soon"}), Call)


def test_what_is_too_large_is_neither_sent_nor_read() -> None:
    with pytest.raises(WireError, match="exceeds the limit"):
        encode(Reply(v=VERSION, call_id="c", body={"x": "y" * MAX_MESSAGE}))
    with pytest.raises(WireError, match="exceeds the limit"):
        decode(b"\x00" * (MAX_MESSAGE + 1), Call)


@pytest.mark.parametrize("kind", errors._KINDS.values())
def test_an_error_keeps_its_kind_hint_and_context(kind: type[KataError]) -> None:
    error = kind("no room", hint="make some", bus="port0")
    reply = Reply(v=VERSION, call_id="c", fault=Fault(**error.to_wire()))  # type: ignore[arg-type]
    fault = decode(encode(reply), Reply).fault
    assert fault is not None
    back = from_wire(fault.kind, fault.message, fault.hint, fault.context)
    assert type(back) is kind
    assert (back.message, back.hint, back.context, str(back)) == (
        "no room",
        "make some",
        {"bus": "port0"},
        "no room (make some)",
    )
