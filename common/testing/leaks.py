"""What one stack has on the host, told apart from everybody else's: to find leaks, and to remove them.

Several stacks run side by side, beside the host's own containers. A thing is this stack's if it carries the mark of
it: a *process* whose environment names our run directory, a *mount* below our root, the *cgroup* and the shim's
*socket* of a sandbox that our services or our shims have named in their logs. All else on the host is not looked at.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.linux import cgroup, mounts
from common.paths import RUN_DIR_VARIABLE

_NAMED = re.compile(r'"sandbox": "([\w.-]+)"')
SHIM_SOCKETS = Path("/run/containerd/s")
"""Where the shims of every containerd listen."""

_KILL_TIMEOUT_S = 10.0
_OF_CONTAINERS = ("containerd-shim", "qemu", "cloud-hypervisor", "firecracker", "virtiofsd")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The marks by which a stack's things are known.

    Attributes:
        root: the directory that holds the stack.
        run_dir: its services' run directory.
        address: its containerd's socket.
        grace_s: how long a shim that was told to end may take; containerd does not wait for it.
    """

    root: Path
    run_dir: Path
    address: Path
    grace_s: float = 20.0

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that have this stack's environment, the caller excepted."""
        return [p for p in psutil.process_iter() if p.pid != psutil.Process().pid and self._is_ours(p)]

    def sandboxes(self) -> list[str]:
        """Return the ids of the sandboxes that have a directory."""
        directory = self.run_dir / "sandboxes"
        return sorted(child.name for child in directory.iterdir()) if directory.is_dir() else []

    def of_containers(self) -> list[str]:
        """Return what containers have on the host, in words: nothing, while none exists."""
        ending = [p for p in self.processes() if name_of(p).startswith(_OF_CONTAINERS)]
        _, living = psutil.wait_procs(ending, timeout=self.grace_s)
        return [
            *(f"sandbox directory {name}" for name in self.sandboxes()),
            *(f"cgroup {name}" for name in self._cgroups()),
            *(f"mount {path}" for path in mounts.mounted_below(str(self.root))),
            *(f"socket {path}" for path in self._sockets()),
            *(f"bundle {path}" for path in (self.root / "state").glob("*.task/*/*")),
            *(f"process {process.pid} {name_of(process)}" for process in living),
        ]

    def everything(self) -> list[str]:
        """Return what the stack has on the host outside its root, in words: nothing, once it has ended."""
        others = [p for p in self.processes() if not name_of(p).startswith(_OF_CONTAINERS)]
        return [
            *self.of_containers(),
            *(f"process {process.pid} {name_of(process)}" for process in others if process.is_running()),
        ]

    def remove(self) -> None:
        """Remove all of it by force, the root excepted.

        Raises:
            OSError: a process or a mount would not go.
        """
        killed = self.processes()
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for name in self._cgroups():
            cgroup.kill(name)
        psutil.wait_procs(killed, timeout=_KILL_TIMEOUT_S)
        mounts.unmount_below(str(self.root))
        for path in self._sockets():
            path.unlink()

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(RUN_DIR_VARIABLE) == str(self.run_dir)
        except psutil.Error:  # it has ended meanwhile
            return False

    def _cgroups(self) -> list[str]:
        return [name for name in sorted(self._known()) if Path(cgroup.path(name)).is_dir()]

    def _sockets(self) -> list[Path]:
        """Return the shims' sockets: containerd names them by its own address, namespace and id."""
        names = (f"{self.address}/default/{sandbox}" for sandbox in sorted(self._known()))
        paths = (SHIM_SOCKETS / hashlib.sha256(name.encode()).hexdigest() for name in names)
        return [path for path in paths if path.is_socket()]

    def _known(self) -> set[str]:
        """Return the ids of all sandboxes that there have been."""
        logs = [file.read_text(errors="replace") for file in (self.run_dir / "log").glob("*.log*")]
        return {*self.sandboxes(), *(name for text in logs for name in _NAMED.findall(text))}


def name_of(process: psutil.Process) -> str:
    """Return a process's name, or nothing if it has ended meanwhile."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def cmdline_of(process: psutil.Process) -> list[str]:
    """Return what a process was started with, or nothing if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
