"""Runs in a guest instead of the agent: what crun itself takes there.

The peer of our Start and Exec is crun in the same guest, without us. The host writes the name of a measurement to the
agent's port and gets a line back: the seconds that crun took, or what went wrong.
"""

from __future__ import annotations

import posix
import time

from common.channel import AGENT_PORT
from guest.agent import modules, ports, system
from guest.agent.reactor import Reactor

_CRUN = "/usr/bin/crun"
_CONTAINER = "sleeping"

MEASUREMENTS = {
    "run": ["run", "--bundle", "/bench/true", "true"],
    "start": ["run", "--detach", "--bundle", "/bench/sleeping", _CONTAINER],
    "exec": ["exec", _CONTAINER, "/bin/true"],
}


def main() -> None:
    """Prepare as the agent does, and measure what is asked for. `exec` wants `start` first."""
    system.mount_basics()
    system.open_console()
    reactor = Reactor()
    uevents = ports.Uevents(reactor)
    modules.load("boot")
    system.prepare_for_containers()
    found = ports.Ports()

    def attempt() -> None:
        node = found.node(AGENT_PORT)
        if node is not None:
            uevents.unlisten(attempt)
            _serve(reactor, ports.open_port(node))

    uevents.listen(attempt)
    attempt()
    reactor.run()


def _serve(reactor: Reactor, port: int) -> None:
    def on_event(_events: int) -> None:
        try:
            while asked := posix.read(port, 4096):
                for name in asked.decode().split():
                    posix.write(port, f"{_measure(name)}\n".encode())
        except BlockingIOError:
            pass

    reactor.watch(port, on_event)


def _measure(name: str) -> str:
    began = time.monotonic()
    status = _crun(MEASUREMENTS[name])
    took = time.monotonic() - began
    return f"crun {name} ended with {status}" if status else f"{took:.4f}"


def _crun(arguments: list[str]) -> int:
    """Run crun, its streams the console; return its wait status."""
    command = ["crun", "--cgroup-manager", "cgroupfs", *arguments]
    _, status = posix.waitpid(posix.posix_spawn(_CRUN, command, {"PATH": "/bin:/usr/bin"}), 0)
    return status
