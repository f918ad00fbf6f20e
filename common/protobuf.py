"""Protocol Buffers messages, declared as Python classes.

Why not Google's library: its import takes 1.5 s in a guest under software emulation, more than all the rest of the
agent (docs/adr/0003-own-protobuf-codec.md). It is the oracle of our tests instead.

A message is a class; a field is its number and its type::

    class Mount(Message):
        type: str = string(1)
        options: list[str] = repeated(string(4))

    Mount(type="bind", options=["ro"]).encode()
    Mount.decode(data).options

Wire format: https://protobuf.dev/programming-guides/encoding/. Presence is proto3's: a scalar that has its default
value is not sent, an absent one reads as its default, an absent message reads as None. Unknown fields are skipped.
Bytes from a guest are hostile: every length is checked against what is left, nesting stops at 32, and a bad message
raises :class:`DecodeError` and nothing else. A field may have two bytes and cost a hundred times that when it is read,
so their number is limited too.

This module is part of the guest and imports nothing that costs time there.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

    M = TypeVar("M", bound="Message")
    T = TypeVar("T")
else:

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        """Stand in for typing's decorator, which only type checkers read."""
        return lambda cls: cls


_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_MAX_DEPTH = 32
_MAX_FIELDS = 1 << 18
"""Fields of one message, nested ones included: a command line as long as execve(2) takes it has fewer arguments."""


class DecodeError(ValueError):
    """The bytes are not a message of this type."""


class _Limits:
    """What one message may still cost: levels of nesting, and fields."""

    __slots__ = ("fields", "levels")

    def __init__(self) -> None:
        self.levels = _MAX_DEPTH
        self.fields = _MAX_FIELDS

    def take_field(self) -> None:
        """Note that a field, or a number of a packed one, is to be read.

        Raises:
            DecodeError: it is one too many.
        """
        self.fields -= 1
        if self.fields < 0:
            raise DecodeError(f"more than {_MAX_FIELDS} fields")


class Field:
    """How one field travels: ``kind`` picks the codec, ``key`` is its encoded tag."""

    __slots__ = ("default", "key", "kind", "message", "name", "number", "repeated")

    def __init__(self, number: int, kind: str, default: object = None, message: type[Message] | None = None) -> None:
        self.number = number
        self.kind = kind
        self.default = default
        self.message = message
        self.repeated = False
        self.name = ""
        self.key = b""


def _field(number: int, kind: str, default: object, message: type[Message] | None = None) -> Any:  # noqa: ANN401
    return Field(number, kind, default, message)


def string(number: int) -> str:
    """A string field."""
    return _field(number, "string", "")  # type: ignore[no-any-return]


def bytes_(number: int) -> bytes:
    """A bytes field."""
    return _field(number, "bytes", b"")  # type: ignore[no-any-return]


def boolean(number: int) -> bool:
    """A bool field."""
    return _field(number, "bool", False)  # type: ignore[no-any-return]


def uint(number: int) -> int:
    """A uint32 or uint64 field."""
    return _field(number, "uint", 0)  # type: ignore[no-any-return]


def int_(number: int) -> int:
    """An int32, int64 or enum field (negative numbers take ten bytes)."""
    return _field(number, "int", 0)  # type: ignore[no-any-return]


def double(number: int) -> float:
    """A double field."""
    return _field(number, "double", 0.0)  # type: ignore[no-any-return]


def message(number: int, kind: type[M]) -> M | None:
    """A field that holds another message, or None."""
    return _field(number, "message", None, kind)  # type: ignore[no-any-return]


def repeated(field: T) -> list[T]:
    """A repeated field; numbers are sent packed and read either way."""
    field.repeated = True  # type: ignore[attr-defined]
    return field  # type: ignore[return-value]


def messages(number: int, kind: type[M]) -> list[M]:
    """A repeated field of messages."""
    return repeated(message(number, kind))  # type: ignore[arg-type]


def map_of(number: int, value: T) -> dict[str, T]:
    """A map field with keys that are strings; ``value`` is the field that its entries have under number 2."""
    return _field(number, "map", None, type("Entry", (Message,), {"key": string(1), "value": value}))  # type: ignore[no-any-return]


def string_map(number: int) -> dict[str, str]:
    """A ``map<string, string>`` field."""
    return map_of(number, string(2))


# Without field specifiers: a field's declaration then counts as its default, and every field may be left out.
@dataclass_transform(kw_only_default=True)
class Message:
    """Base of all messages: keyword constructor, equality, :meth:`encode`, :meth:`decode`."""

    _fields: ClassVar[dict[int, Field]] = {}
    _defaults: ClassVar[dict[str, object]] = {}
    _makers: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls) -> None:
        cls._fields = {}
        cls._defaults = {}
        cls._makers = {}
        for name, field in list(vars(cls).items()):
            if isinstance(field, Field):
                field.name = name
                field.key = _varint(field.number << 3 | _wire_type(field))
                cls._fields[field.number] = field
                cls._defaults[name] = field.default
                if field.repeated or field.kind == "map":
                    cls._makers[name] = list if field.repeated else dict
                delattr(cls, name)

    def __init__(self, **values: Any) -> None:  # noqa: ANN401
        own = vars(self)
        own.update(self._defaults)
        for name, make in self._makers.items():
            own[name] = make()
        if values:
            if not values.keys() <= own.keys():
                raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(values.keys() - own.keys()))}")
            own.update(values)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # messages are mutable

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v)
        return f"{type(self).__name__}({shown})"

    @classmethod
    def fields(cls) -> Iterable[Field]:
        """Return the declared fields in the order of their declaration."""
        return cls._fields.values()

    def encode(self) -> bytes:
        """Return the message's bytes.

        Raises:
            TypeError, ValueError, AttributeError: a field holds a value that its type cannot carry.
        """
        out = bytearray()
        for field in self._fields.values():
            value = getattr(self, field.name)
            if field.kind == "map":
                for k, v in value.items():
                    out += field.key + _ENCODE["message"](field.message(key=k, value=v))  # type: ignore[misc]
            elif not field.repeated:
                if value is not None and (value or field.kind == "message"):
                    out += field.key + _ENCODE[field.kind](value)
            elif value and field.kind in _PACKED:
                out += field.key + _sized(b"".join(map(_ENCODE[field.kind], value)))
            else:
                for item in value:
                    out += field.key + _ENCODE[field.kind](item)
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes | memoryview, limits: _Limits | None = None) -> Self:
        """Read a message.

        Args:
            data: exactly the message's bytes.
            limits: those of the message that it is nested in; callers leave it.

        Raises:
            DecodeError: the bytes are not such a message.
        """
        limits = limits or _Limits()
        limits.levels -= 1
        if limits.levels < 0:
            raise DecodeError(f"{cls.__name__}: nested deeper than {_MAX_DEPTH}")
        self = cls()
        data = bytes(data)  # no copy if it is
        at = 0
        try:
            while at < len(data):
                limits.take_field()
                tag, at = _read_varint(data, at)
                field = cls._fields.get(tag >> 3)
                at = _skip(data, at, tag & 7) if field is None else _read_field(self, field, data, at, tag & 7, limits)
        except (IndexError, struct.error, UnicodeDecodeError) as err:
            raise DecodeError(f"{cls.__name__}: truncated or malformed at byte {at}") from err
        limits.levels += 1
        return self


def _wire_type(field: Field) -> int:
    if field.kind in _PACKED and not field.repeated:
        return _I64 if field.kind == "double" else _VARINT
    return _LEN


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _unsigned(value: int) -> bytes:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} does not fit an unsigned 64-bit field")
    return _varint(value)


def _signed(value: int) -> bytes:
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{value} does not fit a signed 64-bit field")
    return _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _to_signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_PACKED = frozenset(("bool", "uint", "int", "double"))
_ENCODE: dict[str, Callable[[Any], bytes]] = {
    "string": lambda value: _sized(value.encode()),
    "bytes": lambda value: _sized(bytes(value)),
    "bool": lambda value: b"\x01" if value else b"\x00",
    "uint": _unsigned,
    "int": _signed,
    "double": lambda value: struct.pack("<d", value),
    "message": lambda value: _sized(value.encode()),
}
_NUMBER: dict[str, Callable[[int], object]] = {"bool": bool, "uint": int, "int": _to_signed}


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 0x80:  # nearly every tag and length
        return value, at + 1
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise DecodeError("varint longer than ten bytes")


def _read_sized(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _read_varint(data, at)
    end = at + size
    if end > len(data):
        raise DecodeError(f"length {size} exceeds the {len(data) - at} bytes left")
    return data[at:end], end


def _skip(data: bytes, at: int, wire: int) -> int:
    if wire == _VARINT:
        return _read_varint(data, at)[1]
    if wire == _LEN:
        return _read_sized(data, at)[1]
    if wire not in (_I64, _I32):
        raise DecodeError(f"unknown wire type {wire}")
    at += 8 if wire == _I64 else 4
    if at > len(data):
        raise DecodeError("truncated fixed-width field")
    return at


def _read_number(field: Field, data: bytes, at: int) -> tuple[Any, int]:
    if field.kind == "double":
        return struct.unpack_from("<d", data, at)[0], at + 8
    value, at = _read_varint(data, at)
    return _NUMBER[field.kind](value), at


def _read_field(target: Message, field: Field, data: bytes, at: int, wire: int, limits: _Limits) -> int:
    """Read one field's value into ``target``; return where the next one begins."""
    values, name, kind = vars(target), field.name, field.kind
    scalar = kind in _PACKED
    if scalar and wire == _LEN and field.repeated:
        packed, end = _read_sized(data, at)
        inner = 0
        while inner < len(packed):
            limits.take_field()
            value, inner = _read_number(field, packed, inner)
            values[name].append(value)
        return end
    if wire != (_LEN if not scalar else _I64 if kind == "double" else _VARINT):
        raise DecodeError(f"field {name} has wire type {wire}")
    if scalar:
        value, at = _read_number(field, data, at)
    else:
        value, at = _read_sized(data, at)
        if kind == "string":
            value = value.decode()
        elif field.message is not None:
            value = field.message.decode(value, limits)
    if field.repeated:
        values[name].append(value)
    elif kind == "map":
        values[name][value.key] = value.value
    else:
        values[name] = value
    return at
