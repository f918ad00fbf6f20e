"""The contract of the bus: envelopes, typed bodies, limits. docs/wire-protocol.md describes it for other languages.

A message is one MessagePack map. msgpack bounds every length by the message's
own size, and that is bounded here, before an object is built; msgspec then checks the types
and names the first field that is wrong. Unknown fields are ignored, so that a newer peer may say more; an unknown
version is refused, since it may mean something else.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from common.errors import UnsupportedError, WireError

VERSION = 1
MAX_MESSAGE = 1 << 20
"""Bytes of one bus message; nothing that travels here is bulk data."""

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)
S = TypeVar("S", bound=msgspec.Struct)


class Empty(msgspec.Struct, frozen=True):
    """A body that says nothing."""


class Verb(Generic[Q, R]):
    """A thing that a service can be asked: its name and the types of its request and its reply."""

    __slots__ = ("name", "reply", "request")

    def __init__(self, name: str, request: type[Q], reply: type[R]) -> None:
        self.name = name
        self.request = request
        self.reply = reply


class Event(Generic[Q]):
    """A thing that a service publishes: its topic and the type of its body."""

    __slots__ = ("body", "topic")

    def __init__(self, topic: str, body: type[Q]) -> None:
        self.topic = topic
        self.body = body


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call.

    Attributes:
        v: version of the protocol.
        call_id: names this call; also its idempotency key, so a call that is sent again keeps it.
        request_id: the containerd request (or other cause) on whose behalf it is made; logs are joined by it.
        service: which service is meant.
        verb: what is asked.
        deadline_ns: CLOCK_MONOTONIC time after which nobody waits for the answer; checked on receipt.
        traceparent: W3C trace context, or empty.
        body: the verb's request.
    """

    v: int
    call_id: str
    request_id: str
    service: str
    verb: str
    deadline_ns: int
    traceparent: str = ""
    body: dict[str, Any] = {}


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it travels: see :class:`common.errors.KataError`."""

    kind: str
    code: int
    message: str
    hint: str | None = None
    context: dict[str, str] = {}


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a call: ``fault``, or else ``body`` is the verb's reply."""

    v: int
    call_id: str
    fault: Fault | None = None
    body: dict[str, Any] = {}


class News(msgspec.Struct, frozen=True, kw_only=True):
    """An event, or a repeat of the last one's number if ``topic`` is empty.

    Attributes:
        v: version of the protocol.
        publisher: identity of the publishing process; a new one begins at sequence 1 again.
        sequence: of this event, or of the last one, so that the loss of a last event shows.
        topic: what it is about.
        body: the event's body.
    """

    v: int
    publisher: str
    sequence: int
    topic: str = ""
    body: dict[str, Any] = {}


def encode(message: msgspec.Struct) -> bytes:
    """Return a message's bytes.

    Raises:
        WireError: it is larger than ``MAX_MESSAGE``.
    """
    data: bytes = msgpack.packb(msgspec.to_builtins(message))
    if len(data) > MAX_MESSAGE:
        raise WireError(f"bus message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE}")
    return data


def decode(data: bytes, kind: type[S]) -> S:
    """Read an envelope and check its version.

    Raises:
        WireError: the bytes are no such message.
        UnsupportedError: the peer speaks another version.
    """
    if len(data) > MAX_MESSAGE:
        raise WireError(f"bus message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE}")
    try:
        plain = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as err:
        raise WireError(f"not a MessagePack message: {err}") from err
    version = plain.get("v") if isinstance(plain, dict) else None
    if version != VERSION:
        raise UnsupportedError(
            f"bus message of version {version!r}; this process speaks {VERSION}",
            hint="run the same release of pykata in every process",
        )
    return convert(plain, kind)


def convert(plain: object, kind: type[S]) -> S:
    """Check a body against its type.

    Raises:
        WireError: a field is missing or has another type; the message names it.
    """
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as err:
        raise WireError(f"invalid {kind.__name__}: {err}") from err
