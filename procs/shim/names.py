"""Names that ``start`` and ``delete`` must agree on: a sandbox's id and its socket. Standard library only."""

from __future__ import annotations

import os

try:
    from _sha256 import sha256  # type: ignore[import-not-found]  # hashlib loads OpenSSL: 3 ms a call
except ImportError:  # CPython 3.12 has it elsewhere
    from hashlib import sha256

SOCKET_DIR = "/run/containerd/s"
_MAX_ID = 76


def checked_id(text: str) -> str:
    """Return a container id that is safe as a name of files and cgroups.

    The rule is containerd's (v1.6.20 ``identifiers/validate.go``): at most 76 characters, runs of ASCII letters and
    digits joined by single ``.``, ``_`` or ``-``.

    Raises:
        ValueError: it is not such an id.
    """
    runs = text.replace(".", "-").replace("_", "-").split("-")
    if len(text) > _MAX_ID or not all(run.isascii() and run.isalnum() for run in runs):
        raise ValueError(f"container id {text!r} is not valid: at most {_MAX_ID} letters and digits joined by . _ or -")
    return text


def socket_path(address: str, namespace: str, sandbox_id: str) -> str:
    """Return the server's socket: containerd's own rule, so that both find the same (v1.6.20 ``shim/util_unix.go``)."""
    name = os.path.normpath(f"{address}/{namespace}/{sandbox_id}")
    return f"{SOCKET_DIR}/{sha256(name.encode()).hexdigest()}"
