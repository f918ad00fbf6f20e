"""What standard output costs over the port that it travels by, as a ratio; ``python -m bench.streams`` for it alone.

*Ours*: busybox's ``dd`` in a container writes zeros, and they are read from ``ctr task exec``: a pipe, the agent, the
port, the shim, a FIFO, ctr, a pipe. *Bare*: the same ``dd`` writes as many into the same kind of port, and they are
read from QEMU's socket. Both are timed from the first byte to the last, so that no start is in it, and take turns.

The second figure is the time of the guest's processors, starts included: what the guest does for it, however busy the
host is otherwise.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from bench.guest_stream import BLOCK, PRODUCER
from bench.vm import BARE_NAME, bare_vm
from common.testing.containers import new_name, running
from common.testing.stack import Stack
from guest.image.cpio import Archive
from procs.vmm_manager.drivers.probe import Verdict
from procs.vmm_manager.drivers.qemu.channel import AGENT_SOCKET, stream_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

SIZE = 128 << 20
_ROUNDS = 5
_READ = 1 << 20


def main() -> int:
    """Measure, and print the report."""
    print(f"bench: {_ROUNDS} rounds of {SIZE >> 20} MiB of standard output", flush=True)
    with Stack() as stack, running(stack) as name:
        accelerator = msgspec.json.decode((stack.run_dir / "probe.json").read_bytes(), type=Verdict).accelerator
        archive = Archive()
        archive.add_file(PRODUCER, Path("/bin/busybox").read_bytes(), 0o755)
        with bare_vm(accelerator, script="guest_stream", archive=archive) as vm, vm.connect(AGENT_SOCKET) as asked:
            asked.recv(64)  # it is ready
            with vm.connect(stream_socket(0)) as port:
                mine, theirs = GuestClock(name), GuestClock(BARE_NAME)
                rounds = [
                    (mine.timed(lambda: ours(stack, name)), theirs.timed(lambda: bare(asked, port)))
                    for _ in range(_ROUNDS)
                ]
    report(rounds)
    return 0


class Taken(NamedTuple):
    """What it took: seconds of the clock, and of the guest's processors."""

    seconds: float
    guest_seconds: float


class GuestClock:
    """The processors of a VM that a process below this one runs; ``name`` is the VM's."""

    def __init__(self, name: str) -> None:
        below = psutil.Process().children(recursive=True)
        self._vm = next(process for process in below if f"{name},debug-threads=on" in process.cmdline())
        threads = Path(f"/proc/{self._vm.pid}/task").iterdir()
        self._processors = {int(thread.name) for thread in threads if (thread / "comm").read_text().startswith("CPU ")}

    def timed(self, measure: Callable[[], float]) -> Taken:
        """Measure, and note what the guest took for it."""
        began = self._now()
        return Taken(measure(), self._now() - began)

    def _now(self) -> float:
        threads = (thread for thread in self._vm.threads() if thread.id in self._processors)
        return float(sum(thread.user_time + thread.system_time for thread in threads))


def ours(stack: Stack, name: str) -> float:
    """Return the seconds that a container's output takes."""
    dd = ("dd", "if=/dev/zero", f"bs={BLOCK}", f"count={SIZE // BLOCK}")
    command = ("task", "exec", "--exec-id", new_name(), name, *dd)
    pipe, null = subprocess.PIPE, subprocess.DEVNULL  # dd tells on standard error what it did
    with subprocess.Popen(stack.ctr_argv(*command), env=stack.environment, stdout=pipe, stderr=null, bufsize=0) as ctr:
        assert ctr.stdout is not None
        return seconds(ctr.stdout.read)


def bare(asked: socket.socket, port: socket.socket) -> float:
    """Return the seconds that the port alone takes."""
    asked.sendall(f"{SIZE // BLOCK}\n".encode())
    return seconds(port.recv)


def seconds(read: Callable[[int], bytes | None]) -> float:
    """Read all of it; return the seconds from the first bytes to the last.

    Raises:
        ValueError: it ended before.
    """
    size = len(read(_READ) or b"")
    began = time.monotonic()
    while size < SIZE:
        data = read(_READ)
        if not data:
            raise ValueError(f"{size} bytes came of {SIZE}")
        size += len(data)
    return time.monotonic() - began


def report(rounds: list[tuple[Taken, Taken]]) -> None:
    """Print the medians, and that of the ratios within a round."""
    print(f"\n{f'{SIZE >> 20} MiB of standard output':<40} {'seconds':>8} {'guest':>8}")
    for what, column in (("ours", 0), ("the bare port", 1)):
        medians = (statistics.median(values) for values in zip(*(times[column] for times in rounds), strict=True))
        print(f"{what:<40}", *(f"{median:8.3f}" for median in medians))
    of_clock, of_guest = (
        statistics.median(mine[index] / theirs[index] for mine, theirs in rounds) for index in range(len(Taken._fields))
    )
    print(f"stdout: ours / the bare port = {of_clock:.2f}, of the guest's processors {of_guest:.2f}")


if __name__ == "__main__":
    sys.exit(main())
