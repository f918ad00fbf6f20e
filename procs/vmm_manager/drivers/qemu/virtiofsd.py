"""virtiofsd: the daemon that serves a host directory to one VM, Debian's C implementation.

It makes its own mount namespace, a slave of the host's: file systems that are mounted below the source later, which is
how a container's root file system comes, appear in it if the source is a shared mount (mount_namespaces(7)). It ends by
itself when QEMU closes the connection, and with the sandbox's cgroup otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from procs.vmm_manager.drivers.qemu.spawn import listening, spawn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable

    from common.config import QemuConfig


LOG = "virtiofsd.log"


def argv(config: QemuConfig, source: str, fd: int) -> list[str]:
    """Return the command line; ``fd`` is its listening socket."""
    options = (f"source={source}", f"cache={config.virtio_fs_cache}", f"sandbox={_sandbox()}", "log_level=err")
    arguments = [argument for option in options for argument in ("-o", option)]
    return [config.virtio_fs_daemon, f"--fd={fd}", *arguments, *config.virtio_fs_extra_args]


def start(config: QemuConfig, *, source: str, name: str, directory: str, cgroup: str) -> subprocess.Popen[bytes]:
    """Start a daemon that listens on the socket ``name`` in the VM's directory."""
    with listening(directory, name) as listener:
        return spawn(
            argv(config, source, listener.fileno()),
            cgroup=cgroup,
            directory=directory,
            log=LOG,
            fds=[listener.fileno()],
        )


def _sandbox(mountinfo: Iterable[str] | None = None) -> str:
    """Return the strongest sandbox that works here.

    ``namespace`` changes its root by pivot_root(2), which wants the old root to be a mount point: in a chroot it often is
    not, and then ``chroot`` is what is left. mountinfo (proc_pid_mountinfo(5)) shows mount points below our own root.
    """
    if mountinfo is None:
        with Path("/proc/self/mountinfo").open() as lines:
            return _sandbox(lines)
    return "namespace" if any(line.split()[4] == "/" for line in mountinfo) else "chroot"
