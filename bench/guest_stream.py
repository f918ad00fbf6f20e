"""Runs in a guest instead of the agent: has the container's program write into a stream port, as fast as that takes it.

The peer of a container's standard output is the port that it travels by, without us. The host writes a number of blocks
to the agent's port, and so many come out of the first stream port.
"""

from __future__ import annotations

import posix

from common.channel import AGENT_PORT, STREAM_PORT
from guest.agent import modules, ports, system
from guest.agent.reactor import Reactor

BLOCK = 64 << 10
"""Bytes of a block, as the container's program writes them."""
PRODUCER = "/bench/busybox"


def main() -> None:
    """Prepare as the agent does, and have written what is asked for."""
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
            Source(reactor, ports.open_port(asked), posix.open(stream, posix.O_WRONLY | posix.O_CLOEXEC))

    uevents.listen(attempt)
    attempt()
    reactor.run()


class Source:
    """Runs ``dd`` for each number that comes."""

    def __init__(self, reactor: Reactor, asked: int, stream: int) -> None:
        self._asked = asked
        self._stream = stream
        reactor.watch(asked, self._on_event)
        posix.write(asked, b"ready\n")  # the host connects to the stream's port when the guest has it, as the shim does

    def _on_event(self, _events: int) -> None:
        try:
            while asked := posix.read(self._asked, 64):
                self._produce(int(asked))
        except BlockingIOError:
            return

    def _produce(self, count: int) -> None:
        argv = ["dd", "if=/dev/zero", f"bs={BLOCK}", f"count={count}"]
        pid = posix.posix_spawn(PRODUCER, argv, {}, file_actions=[(posix.POSIX_SPAWN_DUP2, self._stream, 1)])
        posix.waitpid(pid, 0)
