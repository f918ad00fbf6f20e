"""Runs in a guest instead of the agent: writes bytes into a stream port, as fast as the port takes them.

The peer of a container's standard output is the port that it travels by, without us. The host writes a number of bytes
to the agent's port, and so many come out of the first stream port.
"""

from __future__ import annotations

import posix

from common.channel import AGENT_PORT, STREAM_PORT
from guest.agent import modules, ports, system
from guest.agent.reactor import Reactor

_CHUNK = bytes(64 << 10)
"""The most that a frame of ours has."""


def main() -> None:
    """Prepare as the agent does, and write what is asked for."""
    system.mount_basics()
    system.open_console()
    reactor = Reactor()
    uevents = ports.Uevents(reactor)
    modules.load("boot")
    found = ports.Ports()

    def attempt() -> None:
        asked, stream = found.node(AGENT_PORT), found.node(f"{STREAM_PORT}0")
        if asked is not None and stream is not None:
            uevents.unlisten(attempt)
            Source(reactor, ports.open_port(asked), ports.open_port(stream))

    uevents.listen(attempt)
    attempt()
    reactor.run()


class Source:
    """Writes, whenever the stream's port takes something, what is left of what was asked for."""

    def __init__(self, reactor: Reactor, asked: int, stream: int) -> None:
        self._asked = asked
        self._stream = stream
        self._left = 0
        reactor.watch(asked, self._ask)
        reactor.watch(stream, self._write)
        posix.write(asked, b"ready\n")  # the host connects to the stream's port when the guest has it, as the shim does

    def _ask(self, _events: int) -> None:
        try:
            while asked := posix.read(self._asked, 64):
                self._left += int(asked)
        except BlockingIOError:
            self._write(0)

    def _write(self, _events: int) -> None:
        try:
            while self._left:
                self._left -= posix.write(self._stream, _CHUNK[: self._left])
        except BlockingIOError:
            return
