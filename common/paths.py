"""Where things are on the host. Standard library only: ``start`` and ``delete`` of the shim use it.

::

    $PYKATA_RUN_DIR (default /run/pykata, 0700)
        bus/<service>              ipc socket of a service, <service>.events its events, <service>.lock its lock
        sandboxes/<id>/            all that one sandbox owns; made by the shim's `start`, removed by its end or `delete`
            shim.json              the shim's process (procs/shim)
            mounts/                mounts for the guest: <container>/rootfs, <container>/mounts/<n> (procs/shim)
            share/                 the same tree, read-only: what virtiofsd exports
            vm/                    the VM manager's alone: vm.json, sockets, console.log
        device-manager/            a journal for each of its shards, and claims.db, which they share
        shim-host.sock, .lock      where `start` finds the process that forks shims (procs/shim/host.py)
        probe.json                 which accelerator works on this host, with the boot id

One sandbox, one directory: cleaning up is "kill the cgroup, unmount below the directory, remove it".
"""

import os

RUN_DIR_VARIABLE = "PYKATA_RUN_DIR"
SYSFS_VARIABLE = "PYKATA_SYSFS"


def run_dir() -> str:
    """Return the run directory: ``$PYKATA_RUN_DIR`` or ``/run/pykata``."""
    return os.environ.get(RUN_DIR_VARIABLE) or "/run/pykata"


def sysfs() -> str:
    """Return where the kernel shows devices: ``/sys``, but for tests, whose host has other ones."""
    return os.environ.get(SYSFS_VARIABLE) or "/sys"


def bus_dir() -> str:
    """Return the directory of the services' ipc sockets."""
    return f"{run_dir()}/bus"


def shim_host_socket() -> str:
    """Return the socket of the process that forks shims."""
    return f"{run_dir()}/shim-host.sock"


def sandboxes_dir() -> str:
    """Return the directory that holds one directory per sandbox."""
    return f"{run_dir()}/sandboxes"


def sandbox_dir(sandbox_id: str) -> str:
    """Return the directory that holds all of one sandbox."""
    return f"{sandboxes_dir()}/{sandbox_id}"


def vm_dir(sandbox_id: str) -> str:
    """Return the VM manager's part of a sandbox's directory."""
    return f"{sandbox_dir(sandbox_id)}/vm"


def mounts_dir(sandbox_id: str) -> str:
    """Return the directory below which the shim mounts what the guest is to see."""
    return f"{sandbox_dir(sandbox_id)}/mounts"


def layers_dir(sandbox_id: str) -> str:
    """Return the directory below which the shim mounts what root file systems are made of."""
    return f"{sandbox_dir(sandbox_id)}/layers"


def share_dir(sandbox_id: str) -> str:
    """Return the directory that virtiofsd exports to the sandbox's guest."""
    return f"{sandbox_dir(sandbox_id)}/share"
