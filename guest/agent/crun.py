"""The OCI runtime: how crun is called, and how what it says is understood.

crun protects itself against containers that overwrite its executable (CVE-2019-5736): unless it runs from a sealed
memfd, it copies itself into one and executes that. The agent makes one such copy for all, so that each call starts crun
once and not twice, which saves 0.11 s under software emulation.
"""

from __future__ import annotations

import fcntl
import posix

from guest.agent.files import read_text
from guest.agent.signals import SIGPIPE, SIGXFSZ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.reaper import Reaper

_EXECUTABLE = "/usr/bin/crun"
_STATE = "/run/crun"
_F_ADD_SEALS = 1033
_ALL_SEALS = 1 | 2 | 4 | 8  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE (fcntl(2)): what crun looks for

_NOT_A_FILE = "open executable: operation not permitted"
_DENIED = "open executable: permission denied"
"""What crun says of a command that is a directory, and of a file that is not executable. runc says the same of both."""

# What a child must not inherit: Python ignores these two, and an ignored signal stays ignored across execve(2).
_DEFAULT_SIGNALS = (SIGPIPE, SIGXFSZ)


class Crun:
    """Runs crun."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._sealed = _sealed_copy(_EXECUTABLE)

    def spawn(self, directory: str, arguments: list[str], streams: list[int], on_exit: Callable[[str], None]) -> None:
        """Run crun.

        Args:
            directory: where its log goes.
            arguments: verb and options.
            streams: descriptors that become 0, 1 and 2, of crun and of the process that it starts.
            on_exit: gets an empty text if it did what it was asked, or else its error.
        """
        log = f"{directory}/crun.log"
        argv = ["crun", "--root", _STATE, "--cgroup-manager", "cgroupfs", "--log", log, *arguments]
        pid = posix.posix_spawn(
            f"/proc/self/fd/{self._sealed}",
            argv,
            {},
            file_actions=[(posix.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in enumerate(streams)],
            setsigdef=_DEFAULT_SIGNALS,
            scheduler=(posix.SCHED_OTHER, posix.sched_param(0)),  # whatever we are (``patience``)
        )
        self._reaper.watch_runtime(pid, lambda status: on_exit(_error(log, status) if status else ""))


def _error(log: str, status: int) -> str:
    """Return what crun says, with the kernel's reason in small letters, as Go writes it.

    ``docker run`` looks for "no such file or directory" and "permission denied" in it to end with 127 and 126.
    """
    what, colon, reason = read_text(log).strip().rpartition(": ")
    said = f"{what}{colon}{reason[:1].lower()}{reason[1:]}" if colon else reason
    if said.endswith(_NOT_A_FILE):
        said = said.removesuffix(_NOT_A_FILE) + _DENIED
    return said or f"crun ended with status {status} and said nothing"


def _sealed_copy(path: str) -> int:
    """Return a memfd that holds the file and can never change."""
    source = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    copy = posix.memfd_create(path, posix.MFD_CLOEXEC | posix.MFD_ALLOW_SEALING)
    size = posix.fstat(source).st_size
    copied = 0
    while copied < size:
        copied += posix.sendfile(copy, source, copied, size - copied)
    posix.close(source)
    fcntl.fcntl(copy, _F_ADD_SEALS, _ALL_SEALS)
    return copy
