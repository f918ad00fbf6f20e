"""``-info``: what containerd 2.x may know of this runtime before it runs anything."""

from __future__ import annotations

import json

from common.mount_options import MOUNT_OPTIONS
from common.protocols.bootstrap import RuntimeInfo, RuntimeVersion
from common.protocols.task import Any
from procs.shim.layers import ALLOWED_MOUNTS

FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

ALLOWED_MOUNTS_ANNOTATION = "containerd.io/runtime-allow-mounts"

FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.0.2",
    "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
    "mountOptions": sorted(MOUNT_OPTIONS),
    "linux": {
        "namespaces": ["ipc", "mount", "pid", "uts"],
        "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False},
        "seccomp": {"enabled": False},
        "apparmor": {"enabled": False},
        "selinux": {"enabled": False},
        "mountExtensions": {"idmap": {"enabled": False}},
    },
}
"""OCI's ``features.md``. Either cgroup will do on the host; the namespaces are those that a container gets; the hooks
are the host's."""


def info(name: str, version: str) -> bytes:
    """Return what ``-info`` prints.

    containerd's mount manager leaves us what it would else mount itself, so that layers can be disks of a guest.
    """
    features = Any(type_url=FEATURES_URL, value=json.dumps(FEATURES).encode())
    annotations = {ALLOWED_MOUNTS_ANNOTATION: ALLOWED_MOUNTS}
    return RuntimeInfo(
        name=name, version=RuntimeVersion(version=version), features=features, annotations=annotations
    ).encode()
