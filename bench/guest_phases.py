"""Runs in a guest before the agent: how far it got when. Prints a line a phase on the console, then is the agent.

Times are by the monotonic clock, which the guest's kernel starts a moment after its own first instruction. The kernel's
log tells its part; it is read here, since a quiet console does not show it, and what that takes is printed as well, to
be left out. The log has another clock: a record of our own tells how far the two are apart.
"""

from __future__ import annotations

import posix
import time

_KMSG = "/bench/dev/kmsg"
_OURS = b"bench: now"
_MARKS = {
    "initrd": b"unpack rootfs image as initramfs",
    "unpacked": b"Freeing initrd memory",
    "kernel": b"as init process",
    "now": _OURS,
}
"""What the kernel logs (init/initramfs.c, init/main.c) when it begins a phase, or has ended one."""


def main() -> None:
    """Note the time, import the agent, tell, and become it."""
    python = time.monotonic()
    from guest.agent import kernel
    from guest.agent.main import main as agent

    imported = time.monotonic()
    kernel.mount("dev", "/bench/dev", "devtmpfs", 0)
    _say(python=python, agent=imported, **_kernel_marks())
    _say(reading=time.monotonic() - imported)
    agent()


def _kernel_marks() -> dict[str, float]:
    """Return when the kernel logged what, by the monotonic clock."""
    log = posix.open(_KMSG, posix.O_RDWR | posix.O_NONBLOCK)
    now = time.monotonic()
    posix.write(log, b"<7>%s\n" % _OURS)  # as debugging, which the console does not show; readable once it is a line
    found: dict[str, float] = {}
    try:
        while True:  # one record a read: "priority,number,microseconds,...;text" (Documentation/ABI/testing/dev-kmsg)
            header, _, text = posix.read(log, 8192).partition(b";")
            for name, mark in _MARKS.items():
                if mark in text:
                    found[name] = int(header.split(b",")[2]) / 1e6
    except BlockingIOError:
        posix.close(log)
    ahead = now - found["now"]
    return {name: at + ahead for name, at in found.items()}


def _say(**times: float) -> None:
    console = posix.open("/bench/dev/console", posix.O_WRONLY | posix.O_NOCTTY)
    for name, at in times.items():
        posix.write(console, f"bench {name} {at:.4f}\n".encode())
    posix.close(console)
