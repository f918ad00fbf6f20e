"""Kata's agent protocol: service ``grpc.Health``. Apart from ``agent``, since the guest answers before it imports that.

Field numbers and names are those of ``health.proto`` of Kata Containers 4.1.0 (src/libs/protocols/protos).
"""

from __future__ import annotations

from common.protobuf import Message, int_, string

HEALTH_SERVICE = "grpc.Health"
AGENT_SERVICE = "grpc.AgentService"

SERVING = 1
"""``HealthCheckResponse.status`` of an agent that is up."""


class CheckRequest(Message):
    """``Health.Check`` and ``Health.Version``."""

    service: str = string(1)


class HealthCheckResponse(Message):
    """``Health.Check``: see :data:`SERVING`."""

    status: int = int_(1)


class VersionCheckResponse(Message):
    """``Health.Version``."""

    grpc_version: str = string(1)
    agent_version: str = string(2)
