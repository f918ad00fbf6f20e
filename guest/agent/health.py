"""``grpc.Health``: what the host asks first, and the only service that needs nothing of the rest."""

from __future__ import annotations

from common.protocols.health import SERVING, CheckRequest, HealthCheckResponse, VersionCheckResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call, Methods, Router

VERSION = "0.1.0"
"""Of this agent: the version of the distribution."""
PROTOCOL_VERSION = "0.0.1"
"""What upstream's agent 4.1.0 reports as its protocol's version."""


def methods(reactor: Reactor, router: Router) -> Methods:
    """Return the service's methods. The first check that is answered has the other services come up."""

    def check(_request: CheckRequest, _call: Call) -> HealthCheckResponse:
        reactor.soon(router.load)
        return HealthCheckResponse(status=SERVING)

    def version(_request: CheckRequest, _call: Call) -> VersionCheckResponse:
        return VersionCheckResponse(grpc_version=PROTOCOL_VERSION, agent_version=VERSION)

    return {"Check": (CheckRequest, check), "Version": (CheckRequest, version)}
