"""How a guest comes up: answer the host as early as possible, do the rest after it has been answered."""

from __future__ import annotations

from common.channel import AGENT_PORT
from common.protocols.health import AGENT_SERVICE, HEALTH_SERVICE
from guest.agent import health, ports, system
from guest.agent.connection import Connection
from guest.agent.log import log
from guest.agent.reactor import Reactor
from guest.agent.rpc import Router

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Methods


def main() -> None:
    """Be PID 1. If this ends, the kernel panics and the VM with it."""
    system.mount_basics()
    system.open_console()
    reactor = Reactor()
    uevents = ports.Uevents(reactor)
    system.load_modules("boot")

    def load() -> Methods:
        from guest.agent import service

        return service.load(reactor, uevents)

    router = Router()
    router.add(HEALTH_SERVICE, health.methods(reactor, router))
    router.add_late(AGENT_SERVICE, load)
    _connect(reactor, uevents, router)
    reactor.run()


def _connect(reactor: Reactor, uevents: ports.Uevents, router: Router) -> None:
    """Serve the agent port as soon as the guest has it."""

    def attempt() -> None:
        node = ports.find(AGENT_PORT)
        if node is not None:
            uevents.unlisten(attempt)
            Connection(reactor, ports.open_port(node), router)
            log("info", "agent is up", port=node)

    uevents.listen(attempt)
    attempt()
