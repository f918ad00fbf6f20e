"""Mounts in the mount namespace of another process, for example of one that a jailer has shut in.

What is mounted in ours later does not get there. A detached mount does: it is made here, where the source can be
named, and attached there (open_tree(2), move_mount(2)). A process with threads cannot change its mount namespace
(setns(2)), so another does it: this module is that program as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from common.linux import mounts

_BIND, _UNMOUNT = "bind", "unmount"


def bind_into(pid: int, source: str, target: str, flags: int = 0) -> None:
    """Show a file or directory of ours in the mounts of another process.

    Args:
        pid: the process.
        source: path, as we see it.
        target: path of a file or directory, as that process sees it.
        flags: what may not be done in it: ``MS_RDONLY`` and so on.

    Raises:
        OSError: the kernel refused; the message has its words.
    """
    _run(_BIND, str(pid), source, target, str(flags))


def unmount_in(pid: int, target: str) -> None:
    """Unmount it there; what is not mounted, or a process that has ended, is fine. Raises as :func:`bind_into` does."""
    if Path(f"/proc/{pid}").exists():
        _run(_UNMOUNT, str(pid), target)


def is_shared_with(pid: int) -> bool:
    """Return whether a process has our mounts."""
    return os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino  # noqa: PTH116 - of the kernel


def _run(*arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "common.linux.mount_namespace", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise OSError(done.stderr.strip().rpartition("\n")[2] or f"{arguments} failed")


def main(verb: str, pid: str, *arguments: str) -> None:
    """Do it in this process, which then has the other's mounts."""
    with open(f"/proc/{pid}/ns/mnt", "rb") as namespace:  # noqa: PTH123 - a descriptor is what is wanted
        if verb == _BIND:
            source, target, flags = arguments
            mounts.mount_into(namespace.fileno(), source, target, int(flags))
        else:
            mounts.enter(namespace.fileno())
            mounts.unmount(arguments[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
