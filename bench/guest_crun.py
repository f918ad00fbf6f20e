"""Runs in a guest instead of the agent: what crun itself takes there. Prints one line a measurement on the console.

The peer of our Start and Exec is crun in the same guest, without us. The benchmark puts this file, a busybox root file
system and a bundle into a second cpio behind the initrd and boots with ``rdinit=/bench/init``.
"""

from __future__ import annotations

import posix
import time

from guest.agent import system

RUNS = 15
_CRUN = "/usr/bin/crun"


def crun(*arguments: str) -> float:
    """Run crun; return its time in seconds."""
    began = time.monotonic()
    pid = posix.posix_spawn(_CRUN, ["crun", *arguments], {"PATH": "/bin:/usr/bin"})
    _, status = posix.waitpid(pid, 0)
    took = time.monotonic() - began
    if status:
        say(f"failed: crun {arguments} ended with {status}")
    return took


def say(text: str) -> None:
    """Print a line that the benchmark looks for."""
    posix.write(1, f"bench {text}\n".encode())


def main() -> None:
    """Measure and end the VM."""
    system.mount_basics()
    system.open_console()
    system.load_modules("boot")
    system.prepare_for_containers()
    posix.chdir("/bench/true")
    for number in range(RUNS):
        say(f"run {crun('run', f'r{number}'):.4f}")
    posix.chdir("/bench/sleep")
    crun("run", "-d", "s")
    for _ in range(RUNS):
        say(f"exec {crun('exec', 's', '/bin/true'):.4f}")
    say("done")
