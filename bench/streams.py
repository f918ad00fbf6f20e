"""What standard output costs over the port that it travels by, as a ratio; ``python -m bench.streams`` for it alone.

*Ours*: busybox's ``dd`` in a container writes zeros, and they are read from ``ctr task exec``: a pipe, the agent, the
port, the shim, a FIFO, ctr, a pipe. *Bare*: the same ``dd`` writes as many into the same kind of port, and they are
read from QEMU's socket. Both are timed from the first byte to the last, so that no start is in it, and take turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.guest_stream import BLOCK, PRODUCER
from bench.vm import bare_vm
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
                rounds = [(ours(stack, name), bare(asked, port)) for _ in range(_ROUNDS)]
    report(rounds)
    return 0


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


def report(rounds: list[tuple[float, float]]) -> None:
    """Print the medians, and that of the ratios within a round."""
    print(f"\n{f'{SIZE >> 20} MiB of standard output':<40} {'seconds':>8}")
    for what, column in (("ours", 0), ("the bare port", 1)):
        print(f"{what:<40} {statistics.median(times[column] for times in rounds):8.3f}")
    print(f"stdout: ours / the bare port = {statistics.median(mine / theirs for mine, theirs in rounds):.2f}")


if __name__ == "__main__":
    sys.exit(main())
