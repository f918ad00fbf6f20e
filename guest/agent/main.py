"""How a guest comes up. An agent that answers is complete: whoever has asked for its health may ask for all else.

It serves whatever way to the host the VM has: the virtio-serial port of the agent's name, a vsock device, or both.
"""

from __future__ import annotations

import gc

from common.channel import AGENT_PORT
from common.protocols.agent import AGENT_SERVICE, HEALTH_SERVICE, STREAMS_SERVICE, TakenRequest
from guest.agent import health, modules, ports, service, system
from guest.agent.connection import Connection
from guest.agent.log import log
from guest.agent.reactor import Reactor
from guest.agent.rpc import Router
from guest.agent.streams import StreamPorts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Methods


def main() -> None:
    """Be PID 1. If this ends, the kernel panics and the VM with it."""
    system.mount_basics()
    has_console = system.open_console()
    reactor = Reactor()
    uevents = ports.Uevents(reactor)
    modules.load("boot")
    if system.is_without_pci():
        modules.load("mmio")
    if not has_console:
        system.open_console()
    system.prepare_for_containers()
    found = ports.Ports()
    streams = StreamPorts(ports.SerialPorts(reactor, found).find)

    def rare_methods() -> Methods:
        from guest.agent import rare

        return rare.methods(reactor, uevents)

    services: dict[str, Methods] = {
        HEALTH_SERVICE: health.METHODS,
        AGENT_SERVICE: service.methods(reactor, uevents, streams),
        STREAMS_SERVICE: {"Taken": (TakenRequest, streams.note_taken)},
    }
    router = Router(services, {AGENT_SERVICE: rare_methods})
    _serve_port(reactor, uevents, found, router)
    if system.has_virtio_device(system.VIRTIO_MEM):
        modules.load("mem")
    if system.has_virtio_device(system.VIRTIO_VSOCK):
        from guest.agent import vsock

        vsock.serve(reactor, router, streams)
        log("info", "agent is up", port="vsock")
    gc.freeze()  # what there is now stays: to look through it again and again would take 8 ms each time under emulation
    gc.enable()
    reactor.run()


def _serve_port(reactor: Reactor, uevents: ports.Uevents, found: ports.Ports, router: Router) -> None:
    """Serve the agent port as soon as the guest has it."""

    def attempt() -> None:
        node = found.node(AGENT_PORT)
        if node is not None:
            uevents.unlisten(attempt)
            Connection(reactor, ports.open_port(node), router)
            log("info", "agent is up", port=node)

    uevents.listen(attempt)
    attempt()
