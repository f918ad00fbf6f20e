"""What an idle shim holds in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from common.testing.stack import Stack

_LARGEST = 8


class Share(NamedTuple):
    """A part of a process's memory.

    Attributes:
        mapping: the file that is mapped, a name in brackets that the kernel gives, or ``anonymous``.
        kib: its proportional set size: pages that n processes share count 1/n.
    """

    mapping: str
    kib: int


def pss_by_mapping(stack: Stack) -> list[Share]:
    """Return the memory of the one shim of a host: the sum, then its largest parts, then all else."""
    (shim,) = stack.processes("containerd-shim-kata-v2")
    parts = sorted(_parse(Path(f"/proc/{shim.pid}/smaps").read_text()), key=lambda share: -share.kib)
    largest, rest = parts[:_LARGEST], parts[_LARGEST:]
    return [Share("all", sum(p.kib for p in parts)), *largest, Share("all else", sum(p.kib for p in rest))]


def _parse(smaps: str) -> list[Share]:
    """Add up proc_pid_smaps(5): a line ``address permissions offset device inode name``, then ``Key: value`` lines."""
    sizes: dict[str, int] = {}
    mapping = ""
    for words in map(str.split, smaps.splitlines()):
        if not words[0].endswith(":"):
            mapping = Path(words[5]).name if len(words) > 5 else "anonymous"
        elif words[0] == "Pss:":
            sizes[mapping] = sizes.get(mapping, 0) + int(words[1])
    return [Share(mapping, kib) for mapping, kib in sizes.items()]
