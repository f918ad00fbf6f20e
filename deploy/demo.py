"""``make demo``: one container in one VM, seen from every side, and nothing left.

Shows what a newcomer wants to know: that it is a VM (another kernel), which processes do it, and where the time goes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING

from common.errors import KataError
from common.testing.stack import IMAGE, RUNTIME, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

_NAME = "demo"
_SCRIPT = 'echo "kernel inside:   $(uname -sr)"; echo "processes inside:"; ps; read -r line; echo "it read: $line"'
_ROLES = {
    "kata-vmm-manager": "VM manager: starts VMs, speaks to QEMU",
    "kata-device-manager": "device manager: owns every hot-plugged device",
    "kata-monitor": "monitor: metrics for Prometheus",
    "containerd-shim-kata-v2": "shim: containerd's Task API, the guest's only peer",
    "qemu-system-x86_64": "the VM",
    "virtiofsd": "serves the root file system to the VM",
    "supervisord": "keeps the services up",
    "containerd": "the one that notices nothing",
}


def main() -> int:
    """Run the demo; return the exit code."""
    print("demo: starting supervisord with the services, and a containerd")
    with timed("set-up"), Stack() as stack:
        pass_or_fail = show(stack)
        left = stack.remains()
        print("demo: stopping everything")
    print("demo: nothing is left" if not left and not stack.root.exists() else f"demo: LEFT BEHIND: {left}")
    return pass_or_fail or (1 if left else 0)


def show(stack: Stack) -> int:
    """Run the container and tell about it; return its exit code."""
    host = subprocess.run(["/bin/uname", "-sr"], capture_output=True, text=True, check=True)
    print(f"kernel of the host: {host.stdout.strip()}")
    command = ["run", "--rm", "--runtime", RUNTIME, IMAGE, _NAME, "sh", "-c", _SCRIPT]
    print(f"demo: ctr {' '.join(command[:-1])} '…'", flush=True)
    began = time.monotonic()
    with subprocess.Popen(
        stack.ctr_argv(*command), env=stack.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ctr:
        assert ctr.stdin is not None
        assert ctr.stdout is not None
        print(f"  {ctr.stdout.readline().rstrip()}    (first line after {time.monotonic() - began:.2f} s)")
        show_processes(stack)
        print("demo: one line into its standard input, then the end")
        with suppress(BrokenPipeError):  # if it never ran, its own words come below
            ctr.stdin.write("a line from the host\n")
            ctr.stdin.close()
        for line in ctr.stdout:
            print(f"  {line.rstrip()}")
    print(f"demo: the container ended with status {ctr.returncode} after {time.monotonic() - began:.2f} s in all")
    show_phases(stack)
    return ctr.returncode


def show_processes(stack: Stack) -> None:
    """List the processes that make the container, and what each is for."""
    print(f"  {'PID':>7} {'MiB':>5}  PROCESS")
    for process in sorted(stack.processes(), key=lambda p: p.pid):
        role = role_of(process)
        if role:
            print(f"  {process.pid:>7} {process.memory_info().rss >> 20:>5}  {role}")


def role_of(process: psutil.Process) -> str:
    """Return what a process is for, or nothing if it is not one of ours."""
    words = [word.rsplit("/", 1)[-1] for word in process.cmdline()[:4]]
    for name, role in _ROLES.items():
        if name in words:
            return f"{name:<24} {role}"
    return ""


def show_phases(stack: Stack) -> None:
    """Print the phases of the boot with their times, from the shim's log records."""
    marks = [(datetime.fromisoformat(record["timestamp"]), record) for record in records(stack)]
    marks = [(at, record) for at, record in marks if record["event"] in {"sandbox phase", "sandbox booted"}]
    for (began, record), (ended, _) in itertools.pairwise(marks):
        print(f"  {record['phase']:<44} {(ended - began).total_seconds():6.3f} s")


def records(stack: Stack) -> Iterator[dict[str, str]]:
    """Yield the JSON records that the shim wrote into containerd's log."""
    for line in (stack.run_dir / "log/containerd.log").read_text().splitlines():
        if line.startswith("{"):
            yield json.loads(line)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long a block took."""
    began = time.monotonic()
    yield
    print(f"demo: {what} and all: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything was removed")
    except (KataError, OSError, subprocess.SubprocessError) as err:
        sys.exit(f"demo: {err}")
