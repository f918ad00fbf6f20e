"""docs/wire-protocol.md is the contract: it names everything that travels."""

from __future__ import annotations

import typing
from pathlib import Path

import msgspec
import pytest

from common.bus import wire
from common.services import device, health, vmm

DOCUMENT = (Path(__file__).resolve().parent.parent.parent / "docs/wire-protocol.md").read_text()
VERBS: list[wire.Verb[msgspec.Struct, msgspec.Struct]] = [
    v for module in (vmm, device, health) for v in vars(module).values() if isinstance(v, wire.Verb)
]
EVENTS: list[wire.Event[msgspec.Struct]] = [
    v for module in (vmm, device, health) for v in vars(module).values() if isinstance(v, wire.Event)
]


def types() -> set[type[msgspec.Struct]]:
    """Return every type that a verb or an event can carry, and the envelopes."""
    found: set[type[msgspec.Struct]] = set()
    open_: list[type[msgspec.Struct]] = [wire.Call, wire.Reply, wire.News, wire.Fault]
    open_ += [event.body for event in EVENTS]
    open_ += [kind for verb in VERBS for kind in (verb.request, verb.reply)]
    while open_:
        kind = open_.pop()
        found.add(kind)
        for field in msgspec.structs.fields(kind):
            for part in (field.type, *typing.get_args(field.type)):
                if isinstance(part, type) and issubclass(part, msgspec.Struct) and part not in found:
                    open_.append(part)
    return found


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_names_every_verb(verb: wire.Verb[msgspec.Struct, msgspec.Struct]) -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{verb.name}` |")]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == [verb.reply.__name__]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.topic)
def test_names_every_event(event: wire.Event[msgspec.Struct]) -> None:
    assert f"| `{event.topic}` |" in DOCUMENT


@pytest.mark.parametrize("kind", sorted(types(), key=str), ids=str)
def test_names_every_field(kind: type[msgspec.Struct]) -> None:
    assert sum(line.startswith(f"| {kind.__name__} |") for line in DOCUMENT.splitlines()) <= 1
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    names = [f"`{field.encode_name}`" for field in msgspec.structs.fields(kind)]
    assert any(all(name in row for name in names) for row in rows), f"no row has {names}"
