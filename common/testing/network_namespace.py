"""A network namespace as a sandbox has one, for the time of a test."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Namespace:
    """A network namespace, as a process has it."""

    def __init__(self, pid: int) -> None:
        self.path = f"/proc/{pid}/ns/net"
        self._enter = ["nsenter", f"--net={self.path}"]

    def ip(self, *arguments: str) -> str:
        """Run ``ip`` in it."""
        return subprocess.run([*self._enter, "ip", *arguments], check=True, capture_output=True, text=True).stdout

    def interfaces(self) -> set[str]:
        """Return what it has beside the loopback."""
        lines = self.ip("-o", "link").splitlines()
        return {line.split(": ")[1].split("@")[0] for line in lines} - {"lo"}

    def add_macvtap(self, name: str) -> str:
        """Make a macvtap on one end of a pair; return its address."""
        self.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
        self.ip("link", "add", "link", "v0", "name", name, "type", "macvtap", "mode", "bridge")
        return self.ip("-o", "link", "show", name).split("link/ether ")[1].split()[0]


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Provide a network namespace."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Namespace(process.pid)
        process.kill()
