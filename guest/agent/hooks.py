"""Hooks that the guest's image has for its containers, below the host's ``guest_hook_path``.

::

    <guest_hook_path>/prestart/    what is executable there runs at that point of each container's life,
    <guest_hook_path>/poststart/   in the order of the names
    <guest_hook_path>/poststop/

A hook gets its file's name and the point as arguments, as with upstream's agent; crun executes it, in the guest and not
in the container. Loaded if there is such a path.
"""

from __future__ import annotations

import posix

from common.protocols.oci import Hook, Hooks

_EXECUTABLE = 0o111
_TYPE, _REGULAR = 0o170000, 0o100000
_TIMEOUT_S = 10


def find(path: str) -> Hooks:
    """Return the hooks below a path; there need not be any."""
    return Hooks(**{stage: _find(f"{path}/{stage}", stage) for stage in ("prestart", "poststart", "poststop")})


def _find(directory: str, stage: str) -> list[Hook]:
    try:
        names = sorted(posix.listdir(directory))
    except FileNotFoundError:
        return []
    return [
        Hook(path=f"{directory}/{name}", args=[name, stage], timeout=_TIMEOUT_S)
        for name in names
        if _is_executable(f"{directory}/{name}")
    ]


def _is_executable(path: str) -> bool:
    mode = posix.stat(path).st_mode
    return mode & _TYPE == _REGULAR and bool(mode & _EXECUTABLE)
