"""How containerd 2.3 and later begin with a shim: what ``start`` reads, what it prints, and what ``-info`` prints.

Field numbers: containerd v2.3.4 ``api/runtime/bootstrap/v1/bootstrap.proto`` and ``api/types/introspection.proto``. On
the wire it is protobuf, though the comment there says JSON. ``start`` imports this module: it must stay light.
"""

from __future__ import annotations

from common.protobuf import Message, int_, message, messages, repeated, string, string_map
from common.protocols.task import Any

LOG_DEBUG = -4
"""A log level; a lower one says more."""


class Extension(Message):
    """Something for the runtime: its options."""

    value: Any | None = message(1, Any)


class BootstrapParams(Message):
    """What ``start`` reads on standard input. ``socket_dir`` is where sockets are wanted, if not at the usual place."""

    instance_id: str = string(1)
    namespace: str = string(2)
    log_level: int = int_(3)
    containerd_version: str = string(4)
    containerd_ttrpc_address: str = string(5)
    containerd_grpc_address: str = string(6)
    containerd_binary: str = string(7)
    extensions: list[Extension] = messages(8, Extension)
    socket_dir: str = string(9)


class BootstrapResult(Message):
    """What ``start`` prints: where and with which version of the Task API the shim serves."""

    version: int = int_(1)
    address: str = string(2)
    protocol: str = string(3)
    capabilities: list[int] = repeated(int_(4))
    metadata: dict[str, str] = string_map(5)


class RuntimeVersion(Message):
    """``containerd.types.RuntimeVersion``."""

    version: str = string(1)
    revision: str = string(2)


class RuntimeInfo(Message):
    """``containerd.types.RuntimeInfo``: what ``-info`` prints; ``features`` are OCI's, as JSON."""

    name: str = string(1)
    version: RuntimeVersion | None = message(2, RuntimeVersion)
    options: Any | None = message(3, Any)
    features: Any | None = message(4, Any)
    annotations: dict[str, str] = string_map(5)
