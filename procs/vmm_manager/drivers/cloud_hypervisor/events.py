"""What Cloud Hypervisor tells without being asked: records on a FIFO.

A record is a JSON object in several lines, then an empty one::

    {
      "timestamp": {"secs": 12, "nanos": 345},
      "source": "vm",
      "event": "device-removed",
      "properties": {"bdf": "0000:00:02.0", "id": "_disk0"}
    }

Cloud Hypervisor inherits the FIFO opened for reading and writing, so there is a reader whether this manager runs or
not, and a manager that starts again finds by name what was told meanwhile. When its 64 KiB are full, what comes is cut
or lost and nobody waits (pipe(7)). So the decoder begins anew at the next record after anything that is none, and says
that something may be missing: then the device tree is asked.

Source: ``event_monitor/src/lib.rs`` and ``start_event_monitor_thread`` of v53.0.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

FIFO = "events"

_CHUNK = 64 << 10
_MAX_RECORD = 16 << 10
_END = b"\n\n"
_BEGIN = b'{\n  "timestamp"'


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        source: for example ``vm`` or ``virtio-device``; empty if something may have been lost here.
        name: for example ``device-removed``.
        device_id: which device it is about, or nothing.
    """

    source: str
    name: str
    device_id: str = ""


LOST = Event("", "lost")


class Decoder:
    """Makes events of bytes, in whatever pieces they come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that are complete now, with :data:`LOST` where there is something else."""
        *records, self._rest = (self._rest + data).split(_END)
        for record in records:
            yield from _events(record)
        if len(self._rest) > _MAX_RECORD:
            self._rest = b""
            yield LOST


def _events(record: bytes) -> Iterator[Event]:
    """Yield the event of a record; one that begins within the remains of another is found there."""
    begin = record.rfind(_BEGIN)
    if begin != 0:
        yield LOST
    if begin < 0:
        return
    event = _event(record[begin:])
    yield LOST if event is None else event


def _event(text: bytes) -> Event | None:
    try:
        fields = json.loads(text)
        properties = fields["properties"] or {}
        return Event(str(fields["source"]), str(fields["event"]), str(properties.get("id", "")))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


class EventStream:
    """The FIFO of one VM.

    Attributes:
        fd: what Cloud Hypervisor inherits.
    """

    def __init__(self, directory: str) -> None:
        path = Path(directory) / FIFO
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._decoder = Decoder()

    async def follow(self, handle: Callable[[Event], Awaitable[None]]) -> None:
        """Hand each event to a handler until the stream is closed. While that is busy, further records wait."""
        while self.fd >= 0:
            await _readable(self.fd)
            with suppress(BlockingIOError):
                for event in self._decoder.feed(os.read(self.fd, _CHUNK)):
                    await handle(event)

    def close(self) -> None:
        """Stop listening; to be called when nobody follows."""
        os.close(self.fd)
        self.fd = -1


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
