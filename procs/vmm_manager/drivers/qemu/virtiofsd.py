"""virtiofsd: the daemon that serves a host directory to one VM, Debian's C implementation.

It makes its own mount namespace, a slave of the host's: file systems that are mounted below the source later, which is
how a container's root file system comes, appear in it if the source is a shared mount (mount_namespaces(7)). It ends by
itself when QEMU closes the connection, and with the sandbox's cgroup otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from procs.vmm_manager.drivers.qemu.spawn import listening, spawn

if TYPE_CHECKING:
    import subprocess

    from common.config import QemuConfig


def argv(config: QemuConfig, source: str, fd: int) -> list[str]:
    """Return the command line; ``fd`` is its listening socket."""
    options = (f"source={source}", f"cache={config.virtio_fs_cache}", "sandbox=namespace", "log_level=err")
    arguments = [argument for option in options for argument in ("-o", option)]
    return [config.virtio_fs_daemon, f"--fd={fd}", *arguments, *config.virtio_fs_extra_args]


def start(config: QemuConfig, *, source: str, name: str, directory: str, cgroup: str) -> subprocess.Popen[bytes]:
    """Start a daemon that listens on the socket ``name`` in the VM's directory."""
    with listening(directory, name) as listener:
        return spawn(
            argv(config, source, listener.fileno()),
            cgroup=cgroup,
            directory=directory,
            log="virtiofsd.log",
            fds=[listener.fileno()],
        )
