"""Our protobuf codec against Google's library, and against hostile bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from common.protobuf import (
    DecodeError,
    Message,
    boolean,
    bytes_,
    double,
    int_,
    map_of,
    message,
    messages,
    repeated,
    string,
    string_map,
    uint,
)


class Inner(Message):
    name: str = string(1)
    sizes: list[int] = repeated(uint(2))


class Everything(Message):
    text: str = string(1)
    data: bytes = bytes_(2)
    flag: bool = boolean(3)
    number: int = uint(4)
    signed: int = int_(5)
    real: float = double(6)
    inner: Inner | None = message(7, Inner)
    words: list[str] = repeated(string(8))
    numbers: list[int] = repeated(uint(9))
    signeds: list[int] = repeated(int_(10))
    reals: list[float] = repeated(double(11))
    flags: list[bool] = repeated(boolean(12))
    inners: list[Inner] = messages(13, Inner)
    labels: dict[str, str] = string_map(14)
    counts: dict[str, int] = map_of(15, uint(2))
    named: dict[str, Inner | None] = map_of(16, message(2, Inner))
    far: str = string(1000)


_TYPES = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "uint": descriptor_pb2.FieldDescriptorProto.TYPE_UINT64,
    "int": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "double": descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    "message": descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
    "map": descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
}


def describe(file: descriptor_pb2.FileDescriptorProto, kind: type[Message]) -> None:
    """Declare one of our messages to Google's library."""
    described = file.message_type.add(name=kind.__name__)
    for field in kind.fields():
        is_many = field.repeated or field.kind == "map"
        added = described.field.add(
            name=field.name, number=field.number, type=_TYPES[field.kind], label=3 if is_many else 1
        )
        if field.message is not None:
            added.type_name = f".oracle.{field.message.__name__}"
        if field.kind == "map":
            added.type_name = f".oracle.{kind.__name__}.{field.name.capitalize()}Entry"
            entry = described.nested_type.add(name=f"{field.name.capitalize()}Entry")
            entry.options.map_entry = True
            assert field.message is not None
            for inner in field.message.fields():
                kept = entry.field.add(name=inner.name, number=inner.number, type=_TYPES[inner.kind], label=1)
                if inner.message is not None:
                    kept.type_name = f".oracle.{inner.message.__name__}"


def google(kind: type[Message]) -> Any:  # noqa: ANN401  # made at run time
    """Return Google's class of one of our messages."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"oracle.{kind.__name__}"))


def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="oracle.proto", package="oracle", syntax="proto3")
    for kind in (Inner, Everything):
        describe(file, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


_POOL = _pool()

unsigned = st.integers(0, (1 << 64) - 1)
signed = st.integers(-(1 << 63), (1 << 63) - 1)
real = st.floats(allow_nan=False)
inners = st.builds(Inner, name=st.text(), sizes=st.lists(unsigned, max_size=3))
examples = st.builds(
    Everything,
    text=st.text(),
    data=st.binary(),
    flag=st.booleans(),
    number=unsigned,
    signed=signed,
    real=real,
    inner=st.none() | inners,
    words=st.lists(st.text(), max_size=3),
    numbers=st.lists(unsigned, max_size=3),
    signeds=st.lists(signed, max_size=3),
    reals=st.lists(real, max_size=3),
    flags=st.lists(st.booleans(), max_size=3),
    inners=st.lists(inners, max_size=3),
    labels=st.dictionaries(st.text(), st.text(), max_size=3),
    counts=st.dictionaries(st.text(), unsigned, max_size=3),
    named=st.dictionaries(st.text(), inners, max_size=3),
    far=st.text(),
)


@given(examples)
def test_what_we_write_we_read(value: Everything) -> None:
    assert Everything.decode(value.encode()) == value


@given(examples)
def test_google_reads_what_we_write(value: Everything) -> None:
    theirs = google(Everything).FromString(value.encode())
    assert same(value, theirs)


@given(examples)
def test_we_read_what_google_writes(value: Everything) -> None:
    theirs = google(Everything).FromString(value.encode())
    assert Everything.decode(theirs.SerializeToString(deterministic=True)) == value


@given(examples)
def test_unknown_fields_are_skipped(value: Everything) -> None:
    assert Inner.decode(Everything(real=value.real, inner=value.inner, far=value.far).encode()) == Inner()


@given(st.binary(max_size=200))
def test_hostile_bytes_are_a_message_or_a_decode_error(data: bytes) -> None:
    try:
        decoded = Everything.decode(data)
    except DecodeError:
        return
    assert Everything.decode(decoded.encode()) == decoded or math.isnan(decoded.real)


@given(examples, st.data())
def test_a_cut_message_is_shorter_or_a_decode_error(value: Everything, data: st.DataObject) -> None:
    encoded = value.encode()
    cut = data.draw(st.integers(0, len(encoded)))
    try:
        decoded = Everything.decode(encoded[:cut])
    except DecodeError:
        return
    assert len(decoded.encode()) <= cut


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x0a\x05abc", "length 5 exceeds the 3 bytes left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "exceeds the 0 bytes left"),
        (b"\x20" + b"\xff" * 10, "varint longer than ten bytes"),
        (b"\x0a\x02\xff\xfe", "malformed"),
        (b"\x08\x01", "field text has wire type 0"),
        (b"\x31\x00", "truncated"),
        (b"\x20", "truncated"),
        (b"\xfb\x3f", "unknown wire type 3"),
        (b"\xfd\x3f\x00", "truncated fixed-width field"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        Everything.decode(data)


class Nest(Message):
    """A message in a message in …"""


_of_itself: Any = message(1, Nest)  # a class cannot name itself while it is made
_of_itself.name = "nest"
Nest._fields = {1: _of_itself}


def nested(levels: int) -> bytes:
    data = b""
    for _ in range(levels):
        data = b"\x0a" + bytes([len(data)]) + data
    return data


def test_nesting_is_bounded() -> None:
    assert vars(Nest.decode(nested(31)))["nest"]
    with pytest.raises(DecodeError, match="nested deeper than 32"):
        Nest.decode(nested(32))


@pytest.mark.parametrize(
    ("head", "field"),
    [
        (b"", Everything(words=["x"]).encode()),
        (b"", Everything(inners=[Inner()]).encode()),
        (b"", b"\x98\x7f\x01"),  # unknown
        (b"\x4a\x81\x80\x10", b"\x01"),  # packed
    ],
)
def test_many_small_fields_are_refused(head: bytes, field: bytes) -> None:
    """Each costs a hundred times its size."""
    with pytest.raises(DecodeError, match="more than 262144 fields"):
        Everything.decode(head + field * ((1 << 18) + 1))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (Everything(number=-1), ValueError),
        (Everything(number=1 << 64), ValueError),
        (Everything(signed=1 << 63), ValueError),
        (Everything(text=1), AttributeError),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_cannot_travel_is_refused(value: Everything, error: type[Exception]) -> None:
    with pytest.raises(error):
        value.encode()


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="Inner has no field colour"):
        Inner(colour="x")  # type: ignore[call-arg]


def test_an_empty_message_is_present() -> None:
    assert Everything.decode(Everything(inner=Inner()).encode()).inner == Inner()
    assert Everything.decode(b"").inner is None


def test_messages_show_what_is_set() -> None:
    assert repr(Everything(text="x", inner=Inner(sizes=[1]))) == "Everything(text='x', inner=Inner(sizes=[1]))"


def same(ours: Message, theirs: Any) -> bool:  # noqa: ANN401  # made at run time
    """Compare one of our messages with one of Google's, field by field."""
    for field in ours.fields():
        value, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.kind == "map":
            is_same = value.keys() == dict(other).keys() and all(
                same(item, other[key]) if isinstance(item, Message) else item == other[key]
                for key, item in value.items()
            )
        elif field.message is None:
            is_same = value == (list(other) if field.repeated else other)
        elif field.repeated:
            is_same = len(value) == len(other) and all(map(same, value, other))
        else:
            is_same = theirs.HasField(field.name) == (value is not None) and (value is None or same(value, other))
        if not is_same:
            return False
    return True
