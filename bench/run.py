"""``make bench``: what a VM costs over a container, as ratios of one run.

Peers are measured in turn with what is measured, so that a machine whose speed drifts drifts for both. Software
emulation is slow and these figures are of one machine: read the ratios.

- cold start: (ours - bare boot) / (runc's ``ctr run`` + ``crun run`` in the guest). What is left of a cold start when
  the VM's own boot is taken off, against the container that it would be and the one that it is.
- exec: ours / (runc's ``ctr task exec`` + ``crun exec`` in the guest).
"""

from __future__ import annotations

import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import bare_boot, crun_in_guest
from common.testing.containers import running
from common.testing.stack import IMAGE, RUNTIME, Stack

if TYPE_CHECKING:
    from collections.abc import Callable

_RUNC = "io.containerd.runc.v2"
_ROUNDS = 11


def main() -> int:
    """Measure everything and print the report."""
    print("bench: crun in the guest", flush=True)
    samples = {f"crun {kind} in the guest": values for kind, values in crun_in_guest().items()}
    with Stack() as stack:
        print(f"bench: {_ROUNDS} rounds of cold starts", flush=True)
        samples |= interleaved(
            {
                "bare boot to agent answers": bare_boot,
                "runc: ctr run": lambda: timed_ctr(stack, "run", "--rm", "--runtime", _RUNC, IMAGE, name(), "true"),
                "kata: ctr run": lambda: timed_ctr(stack, "run", "--rm", "--runtime", RUNTIME, IMAGE, name(), "true"),
            }
        )
        print(f"bench: {_ROUNDS} rounds of execs", flush=True)
        with running(stack, runtime=_RUNC) as plain, running(stack) as ours:
            samples |= interleaved(
                {
                    "runc: ctr task exec": lambda: timed_ctr(stack, "task", "exec", "--exec-id", name(), plain, "true"),
                    "kata: ctr task exec": lambda: timed_ctr(stack, "task", "exec", "--exec-id", name(), ours, "true"),
                }
            )
            memory = shim_memory(stack)
    report(samples)
    print("\nidle shim, PSS by what it maps (KiB):")
    for what, kib in memory:
        print(f"  {kib:>7}  {what}")
    return 0


def name() -> str:
    """Return an id that was not used before."""
    return f"b{uuid.uuid4().hex[:8]}"


def timed_ctr(stack: Stack, *arguments: str) -> float:
    """Run ctr; return its time in seconds."""
    began = time.monotonic()
    stack.ctr(*arguments, check=True)
    return time.monotonic() - began


def interleaved(measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Take each measure in turn, round after round; the first round warms up and is not counted."""
    samples: dict[str, list[float]] = {what: [] for what in measures}
    for number in range(_ROUNDS + 1):
        for what, measure in measures.items():
            took = measure()
            if number:
                samples[what].append(took)
    return samples


def report(samples: dict[str, list[float]]) -> None:
    """Print medians, 99th percentiles (the worst of so few) and the ratios of the medians."""
    print(f"\n{'seconds':<32} {'median':>8} {'p99':>8} {'n':>4}")
    median = {what: statistics.median(values) for what, values in samples.items()}
    for what, values in samples.items():
        print(f"{what:<32} {median[what]:8.3f} {max(values):8.3f} {len(values):4}")
    over = median["kata: ctr run"] - median["bare boot to agent answers"]
    cold = over / (median["runc: ctr run"] + median["crun run in the guest"])
    execs = median["kata: ctr task exec"] / (median["runc: ctr task exec"] + median["crun exec in the guest"])
    print(f"\ncold start without the boot: {over:.3f} s = {cold:.2f} x (runc's ctr run + crun run in the guest)")
    print(
        f"exec: {median['kata: ctr task exec']:.3f} s = {execs:.2f} x (runc's ctr task exec + crun exec in the guest)"
    )


def shim_memory(stack: Stack) -> list[tuple[str, int]]:
    """Return the proportional set size of the shim by mapping, largest first, the sum before them."""
    shim = next(p for p in stack.processes() if any(w.endswith("shim-kata-v2") for w in p.cmdline()[:3]))
    sizes: dict[str, int] = {}
    mapping = "anonymous"
    for line in Path(f"/proc/{shim.pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            mapping = Path(words[5]).name if len(words) > 5 else "anonymous"
        elif words[0] == "Pss:":
            sizes[mapping] = sizes.get(mapping, 0) + int(words[1])
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    return [("all", sum(sizes.values())), *largest[:8]]


if __name__ == "__main__":
    sys.exit(main())
