"""``-info``: what containerd 2.x may know of this runtime before it runs anything."""

from __future__ import annotations

import json

from common.mount_options import MOUNT_OPTIONS
from common.protocols.bootstrap import RuntimeInfo, RuntimeVersion
from common.protocols.task import Any

FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

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

    There is no ``containerd.io/runtime-allow-mounts``, by which a runtime takes mounts over from containerd's mount
    manager: what is not a plain mount of a snapshot (layers of erofs, templates of overlays) containerd makes itself,
    and we share it. An image file with a file system comes to us without that.
    """
    features = Any(type_url=FEATURES_URL, value=json.dumps(FEATURES).encode())
    return RuntimeInfo(name=name, version=RuntimeVersion(version=version), features=features).encode()
