"""``grpc.Health``: what the host asks first."""

from __future__ import annotations

from common.protocols.health import SERVING, CheckRequest, HealthCheckResponse, VersionCheckResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Call, Methods

VERSION = "0.1.0"
"""Of this agent: the version of the distribution."""
PROTOCOL_VERSION = "0.0.1"
"""What upstream's agent 4.1.0 reports as its protocol's version."""


def _check(_request: CheckRequest, _call: Call) -> HealthCheckResponse:
    return HealthCheckResponse(status=SERVING)


def _version(_request: CheckRequest, _call: Call) -> VersionCheckResponse:
    return VersionCheckResponse(grpc_version=PROTOCOL_VERSION, agent_version=VERSION)


METHODS: Methods = {"Check": (CheckRequest, _check), "Version": (CheckRequest, _version)}
