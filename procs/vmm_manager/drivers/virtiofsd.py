"""virtiofsd: the daemon that serves a host directory to one VM, Debian's C implementation.

It makes its own mount namespace, a slave of the host's: file systems that are mounted below the source later, which is
how a container's root file system comes, appear in it if the source is a shared mount (mount_namespaces(7)). It enters
its sandbox when the VMM connects, ends by itself when the VMM closes the connection, and with the sandbox's cgroup
otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from procs.vmm_manager.drivers.spawn import Process, listening

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.config import VirtioFsSection


def start(config: VirtioFsSection, *, source: str, name: str, directory: str, cgroup: str, log: str) -> Process:
    """Start a daemon that listens on the socket ``name`` in the VM's directory."""
    with listening(directory, name) as listener:
        command = argv(config, source, listener.fileno(), sandbox=_sandbox())
        return Process.start(command, cgroup=cgroup, directory=directory, log=log, fds=[listener.fileno()])


def argv(config: VirtioFsSection, source: str, fd: int, *, sandbox: str) -> list[str]:
    """Return the command line.

    Args:
        config: the hypervisor's section.
        source: the directory to serve.
        fd: the daemon's listening socket.
        sandbox: how it locks itself up: ``namespace`` or ``chroot``.
    """
    options = (f"source={_escaped(source)}", f"cache={config.virtio_fs_cache}", f"sandbox={sandbox}", "log_level=err")
    arguments = [argument for option in options for argument in ("-o", option)]
    return [config.virtio_fs_daemon, f"--fd={fd}", *arguments, *config.virtio_fs_extra_args]


def _escaped(value: str) -> str:
    """Return a value as libfuse's option parser reads it: a comma ends one, a backslash quotes (fuse_opt.h)."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _sandbox(mountinfo: Iterable[str] | None = None) -> str:
    """Return the strongest sandbox that works here.

    ``namespace`` changes its root by pivot_root(2), which wants the old root to be a mount point: in a chroot it often
    is not, and then ``chroot`` is what is left. proc_pid_mountinfo(5) shows mount points below our own root.
    """
    if mountinfo is None:
        with Path("/proc/self/mountinfo").open() as lines:
            return _sandbox(lines)
    return "namespace" if any(line.split()[4] == "/" for line in mountinfo) else "chroot"
