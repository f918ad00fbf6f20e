"""What a shim that the host forked has of its caller, so that it is as if the caller had forked it.

============================================================  ==========================================================
namespaces, root directory, user, capabilities, label         must be the host's own: the caller forks by itself if not
cgroups of every hierarchy, limits, priority, CPUs, OOM       taken over
score, umask, groups, name and command line
environment, listener, lock                                   passed (:mod:`procs.shim.host`)
working directory, session, signals, standard streams         the same for every shim (:mod:`procs.shim.launch`)
============================================================  ==========================================================

Source: proc(5) and its pages of ``status``, ``ns``, ``cgroup``, ``mountinfo``, ``stat``, ``attr``; cgroups(7).
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

MAX_COMMAND_LINE = 2048
"""How many bytes of its caller's command line a shim shows."""

_CREDENTIALS = ("Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
_LIMITS = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


def take_over(pid: int) -> None:
    """Make the calling process like a child of another.

    Args:
        pid: the other, which waits meanwhile.

    Raises:
        OSError: it cannot be made so.
    """
    _require_same(pid)
    _join_cgroups(pid)
    status = _status(pid)
    for limit in _LIMITS:
        resource.prlimit(0, limit, resource.prlimit(pid, limit))
    os.setgroups([int(group) for group in status["Groups"].split()])
    os.umask(int(status["Umask"], 8))
    os.sched_setscheduler(0, os.sched_getscheduler(pid), os.sched_getparam(pid))
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, pid))
    for name in ("oom_score_adj", "comm"):
        Path(f"/proc/self/{name}").write_bytes(Path(f"/proc/{pid}/{name}").read_bytes())
    _show_command_line(Path(f"/proc/{pid}/cmdline").read_bytes())


def _require_same(pid: int) -> None:
    """Compare what a process cannot change, or should not.

    Raises:
        PermissionError: something differs.
    """
    ours, theirs = ({**_places(who), **_status(who)} for who in ("self", pid))
    for name in {*_CREDENTIALS, *_places("self")}:
        if ours.get(name) != theirs.get(name):
            raise PermissionError(f"{name} of the caller is {theirs.get(name)}, ours is {ours.get(name)}")


def _places(pid: int | str) -> dict[str, str]:
    """Return where a process is: its namespaces, its root directory and its label, by name."""
    root = Path(f"/proc/{pid}/root").stat()
    namespaces = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{pid}/ns").iterdir()}
    return {**namespaces, "root": f"{root.st_dev}:{root.st_ino}", "label": _label(pid)}


def _label(pid: int | str) -> str:
    try:
        return Path(f"/proc/{pid}/attr/current").read_text()
    except OSError:  # no security module that has labels
        return ""


def _status(pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _join_cgroups(pid: int) -> None:
    """Enter the cgroups of a process, of whichever hierarchy they are."""
    ours, theirs = _cgroups("self"), _cgroups(pid)
    for controllers, path in theirs.items():
        if ours.get(controllers) != path:
            Path(_cgroup_dir(controllers, path), "cgroup.procs").write_text("0")  # which means the writer


def _cgroups(pid: int | str) -> dict[str, str]:
    """Return a process's cgroup by its hierarchy's controllers, which in cgroup2 are none."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}


def _cgroup_dir(controllers: str, path: str) -> str:
    """Return where a cgroup is mounted.

    Raises:
        FileNotFoundError: nowhere.
    """
    wanted = ("cgroup", set(controllers.split(","))) if controllers else ("cgroup2", set[str]())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split()[3:5]
        if kind == wanted[0] and wanted[1] <= set(options.split(",")) and path.startswith(root):
            return f"{point}/{path[len(root) :]}"
    raise FileNotFoundError(f"the caller's cgroup {path} of hierarchy {controllers or 'cgroup2'!r} is not mounted here")


def _show_command_line(command_line: bytes) -> None:
    """Show another's command line as our own, by which tools find a shim; no longer than ours was."""
    stat = Path("/proc/self/stat").read_bytes()
    begin, end = map(int, stat[stat.rindex(b")") :].split()[46:48])  # fields 48 and 49, arg_start and arg_end
    room = end - begin
    with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
        memory.seek(begin)
        memory.write(command_line[: room - 1].ljust(room, b"\0"))
