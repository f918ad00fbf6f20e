"""``make demo``: one container in one VM, seen from every side, and nothing left.

Shows what a newcomer wants to know: that it is a VM (another kernel), which processes do it, and where the time goes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from common.config import HYPERVISORS
from common.errors import KataError
from common.testing.stack import IMAGE, RUNTIME, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

_BEGAN = time.monotonic()
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_SCRIPT = 'echo "kernel inside:      $(uname -sr)"; echo "processes inside:"; ps; read -r line; echo "it read: $line"'
_ROLES = {
    "kata-vmm-manager": "VM manager: starts VMs, speaks to the hypervisor",
    "kata-device-manager": "device manager: owns every hot-plugged device",
    "kata-shim-host": "shim host: forks shims that have imported everything",
    "kata-monitor": "monitor: metrics for Prometheus",
    "containerd-shim-kata-v2": "shim: containerd's Task API, the guest's only peer",
    "qemu-system-x86_64": "the VM",
    "cloud-hypervisor": "the VM",
    "virtiofsd": "serves the root file system to the VM",
    "supervisord": "keeps the services up",
    "containerd": "the one that notices nothing",
}


def main() -> int:
    """Run the demo; return the exit code."""
    for number in _INTERRUPTS:
        signal.signal(number, interrupt)
    arguments = parsed_arguments()
    section = {"path": arguments.path} if arguments.path else {}
    with Stack(hypervisor=arguments.hypervisor, section=section, report=say) as stack:
        status = show(stack)
        say("stopping everything")
        ignore_interrupts()  # it ends anyway
    if stack.left_behind:
        say(f"LEFT BEHIND, and removed by force: {', '.join(stack.left_behind)}")
    else:
        say("nothing is left: no process, mount, cgroup, socket or file")
    return status or (1 if stack.left_behind else 0)


def parsed_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Runs a container in a VM, seen from every side.")
    parser.add_argument("--hypervisor", choices=HYPERVISORS, default="qemu", help="default: %(default)s")
    parser.add_argument("--path", help="the hypervisor's program, if it is not where the configuration expects it")
    return parser.parse_args()


def show(stack: Stack) -> int:
    """Run the container and tell about it; return its exit code."""
    name = f"demo-{os.getpid()}"  # a demo that runs beside this one has another
    say(f"ctr run --rm --runtime {RUNTIME} {IMAGE} {name} sh -c '…'")
    with subprocess.Popen(
        stack.ctr_argv("run", "--rm", "--runtime", RUNTIME, IMAGE, name, "sh", "-c", _SCRIPT),
        env=stack.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as ctr:
        assert ctr.stdin is not None
        assert ctr.stdout is not None
        if first := ctr.stdout.readline():  # else it never ran, and ctr says why
            say("its first line")
            host = os.uname()
            print(f"  kernel of the host: {host.sysname} {host.release}\n  {first.rstrip()}")
            show_processes(stack)
            say("one line into its standard input, then the end of file")
        with suppress(BrokenPipeError):
            ctr.stdin.write("a line from the host\n")
            ctr.stdin.close()
        for line in ctr.stdout:
            print(f"  {line.rstrip()}")
    say(f"it ended with status {ctr.returncode}; what the start was spent on:")
    show_phases(stack)
    say("and its end:")
    show_end(stack)
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


def show_end(stack: Stack) -> None:
    """Print what the end was spent on, by the shim's own account."""
    ended = next((record for record in records(stack) if record["event"] == "sandbox stopped"), None)
    for phase, seconds in ended["seconds"].items() if ended else ():
        print(f"  {phase:<44} {seconds:6.3f} s")


def records(stack: Stack) -> Iterator[dict[str, Any]]:
    """Yield the JSON records that the shim wrote into containerd's log."""
    for line in (stack.run_dir / "log/containerd.log").read_text().splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def say(text: str) -> None:
    """Print a step, with the time since the demo began."""
    print(f"[{time.monotonic() - _BEGAN:6.2f} s] {text}", flush=True)


def interrupt(_number: int, _frame: object) -> None:
    """End the demo, once: by an exception, so that everything is removed."""
    ignore_interrupts()
    raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """Let nothing interrupt the cleaning up."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything was removed")
    except (KataError, OSError, subprocess.SubprocessError) as err:
        sys.exit(f"demo: {err}")
