"""``delete``: leave nothing of a sandbox behind, with every service down. Standard library only, under a second.

containerd executes it after each orderly end, when it finds nothing to do, and after the death of a shim, when it is
all that stands between the sandbox and a leak. It may itself be killed and run again: every step accepts that it was
done. The order follows from who uses what: processes hold mounts, mounts hold directories.

1. kill the shim, so that nobody makes anything new;
2. kill the sandbox's cgroup: VMM and virtiofsd; wait until they are gone; then loggers that the shim had started;
3. unmount all below the sandbox's directory and the bundle's root file system;
4. remove the socket and the directory. If a mount is still there this step is not reached: what lies below it
   belongs to the container's owner.

After an orderly end only the last two have something to look at, so only they are imported at once.

A sandbox's id is unique per host, containerd's per namespace. What a living shim serves for another bundle is not ours:
of a `start` that was refused for that reason only the bundle is left.
"""

from __future__ import annotations

import os
import time

from common import paths
from common.linux import mounts
from common.protocols.task import DeleteResponse, Timestamp

KILLED = 128 + 9


def delete(sandbox_id: str, bundle: str, socket_path: str) -> bytes:
    """Clean up and return the ``DeleteResponse`` that containerd makes an exit event from."""
    if _serves_another(sandbox_id, bundle):
        pid = 0
        mounts.unmount_below(f"{bundle}/rootfs")
    else:
        pid = clean(sandbox_id, bundle, socket_path)
    now = Timestamp.from_ns(time.time_ns())
    return DeleteResponse(pid=pid, exit_status=KILLED, exited_at=now).encode()


def _serves_another(sandbox_id: str, bundle: str) -> bool:
    """Return whether a living shim serves the sandbox for another bundle."""
    if not os.path.lexists(paths.sandbox_dir(sandbox_id)):
        return False
    from procs.shim import record

    shim = record.read(sandbox_id)
    return shim is not None and shim["bundle"] != os.path.realpath(bundle) and record.is_served(sandbox_id)


def clean(sandbox_id: str, bundle: str, socket_path: str) -> int:
    """Remove all that is left of a sandbox; return the pid of its shim, or 0 if there was none.

    Raises:
        OSError: a process or a mount would not go; nothing below it was removed.
    """
    pid = 0
    directory = paths.sandbox_dir(sandbox_id)
    if os.path.lexists(directory):
        pid, socket_path = _kill_shim(sandbox_id, socket_path)
        kill_vm(sandbox_id)
        _kill_helpers(sandbox_id)
        mounts.unmount_below(directory)
    mounts.unmount_below(f"{bundle}/rootfs")
    if os.path.lexists(socket_path):
        os.unlink(socket_path)
    remove_tree(directory)
    return pid


def kill_vm(sandbox_id: str) -> None:
    """Kill the VM and all that belongs to it. The services see that it is gone, or find that out when they start."""
    from common.linux import cgroup

    cgroup.kill(sandbox_id)


def remove_tree(directory: str) -> None:
    """Remove a directory in which nothing is mounted, and all in it; one that is not there is fine.

    The VM manager, which sees its VM end, removes its part of the directory at the same time.
    """
    for parent, directories, files in os.walk(directory, topdown=False):
        for name in files:
            _remove(f"{parent}/{name}")
        for name in directories:
            _remove(f"{parent}/{name}")
    if os.path.lexists(directory):
        _remove(directory)


def _remove(path: str) -> None:
    is_directory = os.path.isdir(path) and not os.path.islink(path)
    try:
        os.rmdir(path) if is_directory else os.unlink(path)
    except FileNotFoundError:
        return


def _kill_shim(sandbox_id: str, socket_path: str) -> tuple[int, str]:
    """Kill the shim that the sandbox's record names, unless it is the caller's own; return its pid, or 0, and socket.

    Args:
        sandbox_id: whose.
        socket_path: the socket that is returned if there is no record.
    """
    from common.linux import identity
    from procs.shim import record

    shim = record.read(sandbox_id)
    if shim is None:
        return 0, socket_path
    pid = int(shim["pid"])
    if pid != os.getpid() and shim["boot_id"] == identity.boot_id():
        identity.kill(pid, int(shim["start_time"]))
    return pid, str(shim["socket"])


def _kill_helpers(sandbox_id: str) -> None:
    """Kill the loggers that have not ended: since the shim's death they have read the end of what they log."""
    from common.linux import identity
    from procs.shim import record

    for pid, start_time in record.helpers(sandbox_id):
        identity.kill(pid, start_time)
