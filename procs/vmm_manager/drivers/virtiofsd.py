"""virtiofsd: the daemon that serves a host directory to one VM, in C or in Rust.

QEMU's own was written in C until QEMU 8.0, and Debian 12 has it; its successor in Rust (gitlab.com/virtio-fs/virtiofsd)
takes other arguments. Which one ``virtio_fs_daemon`` is, it says itself.

It makes its own mount namespace, a slave of the host's: file systems that are mounted below the source later, which is
how a container's root file system comes, appear in it if the source is a shared mount (mount_namespaces(7)). It enters
its sandbox when the VMM connects, ends by itself when the VMM closes the connection, and with the sandbox's cgroup
otherwise.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import HypervisorError
from procs.vmm_manager.drivers.spawn import Process, listening

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.config import VirtioFsSection

_VERSION_TIMEOUT_S = 5


def start(config: VirtioFsSection, *, source: str, name: str, directory: str, cgroup: str, log: str) -> Process:
    """Start a daemon that listens on the socket ``name`` in the VM's directory."""
    with listening(directory, name) as listener:
        which = is_rust(config.virtio_fs_daemon)
        command = argv(config, source, listener.fileno(), sandbox=_sandbox(), is_rust=which)
        return Process.start(command, cgroup=cgroup, directory=directory, log=log, fds=[listener.fileno()])


def argv(config: VirtioFsSection, source: str, fd: int, *, sandbox: str, is_rust: bool) -> list[str]:
    """Return the command line.

    Args:
        config: the hypervisor's section.
        source: the directory to serve.
        fd: the daemon's listening socket.
        sandbox: how it locks itself up: ``namespace`` or ``chroot``.
        is_rust: which daemon it is.
    """
    arguments = (_rust_arguments if is_rust else _c_arguments)(source, config.virtio_fs_cache, sandbox)
    return [config.virtio_fs_daemon, f"--fd={fd}", *arguments, *config.virtio_fs_extra_args]


def _rust_arguments(source: str, cache: str, sandbox: str) -> list[str]:
    cache = "never" if cache == "none" else cache
    return [f"--shared-dir={source}", f"--cache={cache}", f"--sandbox={sandbox}", "--log-level=error"]


def _c_arguments(source: str, cache: str, sandbox: str) -> list[str]:
    cache = "none" if cache == "never" else cache
    options = (f"source={_escaped(source)}", f"cache={cache}", f"sandbox={sandbox}", "log_level=err")
    return [argument for option in options for argument in ("-o", option)]


def is_rust(path: str) -> bool:
    """Ask a daemon which one it is, once for each program: ``virtiofsd 1.13.0`` or ``virtiofsd version 7.2.22``.

    Raises:
        HypervisorError: it does not say.
    """
    try:
        return _is_rust(path, Path(path).stat().st_mtime_ns)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise HypervisorError(f"virtiofsd {path} does not tell its version: {err}") from err


@functools.lru_cache(maxsize=8)
def _is_rust(path: str, _changed_ns: int) -> bool:
    asked = subprocess.run([path, "--version"], capture_output=True, check=False, timeout=_VERSION_TIMEOUT_S)
    name, _, version = asked.stdout.partition(b" ")
    return name == b"virtiofsd" and version[:1].isdigit()


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
