"""``make bench``: what a VM costs over a container, as ratios of one run.

Peers are measured in turn with what is measured, so that a machine whose speed drifts drifts for both; what is compared
is compared within a round, and the median taken over the rounds. Software emulation is slow and these figures are of
one machine: read the ratios.

- cold start: (ours - bare boot) / (runc's ``ctr run`` + ``crun run`` in the guest). What is left of a cold start when
  the VM's own boot is taken off, against the container that it would be and the one that it is: the first of its guest.
  The boot is most of it and varies by more than what is left: the quartiles are told. Therefore by its parts too: what
  of our runs is not their own boot, by the logs, against the same; and their own boots against the bare ones.
- exec: ours / (runc's ``ctr task exec`` + ``crun exec`` in the guest).

Then, without a peer: where the bare boot's time goes, and what holds an idle shim's memory. Last, ``bench.hotplug``,
``bench.shards`` and ``bench.streams``, which say themselves what they measure.
"""

from __future__ import annotations

import statistics
import sys
import time
import uuid
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from bench import hotplug, shards, streams
from bench.memory import pss_by_mapping
from bench.peers import bare_boot, crun_in_guest, first_crun_run
from bench.phases import boot_phases
from common.testing.containers import running
from common.testing.stack import IMAGE, RUNTIME, Stack
from procs.vmm_manager.drivers.probe import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.memory import Share

_RUNC = "io.containerd.runc.v2"
_ROUNDS = 15
_PHASE_ROUNDS = 5

_BOOT, _OWN_BOOT = "bare boot to agent answers", "kata's own boot, in ctr run"
_RUN, _RUNC_RUN, _CRUN_RUN = "kata: ctr run", "runc: ctr run", "crun run in the guest"
_EXEC, _RUNC_EXEC, _CRUN_EXEC = "kata: ctr task exec", "runc: ctr task exec", "crun exec in the guest"


def main() -> int:
    """Measure everything and print the report."""
    with Stack() as stack:
        accelerator = probed(stack)
        samples, memory = measure(stack, accelerator)
    say(f"{_PHASE_ROUNDS} bare boots, by phase")
    boots = [boot_phases(accelerator) for _ in range(_PHASE_ROUNDS)]
    print(f"\naccelerator: {accelerator}")
    report(samples)
    report_phases({phase: statistics.median(boot[phase] for boot in boots) for phase in boots[0]})
    report_memory(memory)
    hotplug.main()
    shards.main()
    streams.main()
    return 0


def probed(stack: Stack) -> str:
    """Run a first container, for which the VM manager finds out whether KVM works; return what it found."""
    ctr_run(stack, RUNTIME)
    return msgspec.json.decode((stack.run_dir / "probe.json").read_bytes(), type=Verdict).accelerator


def measure(stack: Stack, accelerator: str) -> tuple[dict[str, list[float]], list[Share]]:
    """Return the seconds of everything that has a peer, and the memory of the shim that took the execs."""
    say(f"{_ROUNDS} rounds of cold starts")
    samples = interleaved(
        {
            _BOOT: lambda: bare_boot(accelerator),
            _RUN: lambda: ctr_run(stack, RUNTIME),
            _RUNC_RUN: lambda: ctr_run(stack, _RUNC),
            _CRUN_RUN: lambda: first_crun_run(accelerator),
        }
    )
    samples[_OWN_BOOT] = own_boots(stack)[-_ROUNDS:]
    say(f"{_ROUNDS} rounds of execs")
    with crun_in_guest(accelerator) as crun, running(stack, runtime=_RUNC) as plain, running(stack) as ours:
        crun("start")
        samples |= interleaved(
            {
                _EXEC: lambda: ctr_exec(stack, ours),
                _RUNC_EXEC: lambda: ctr_exec(stack, plain),
                _CRUN_EXEC: lambda: crun("exec"),
            }
        )
        return samples, pss_by_mapping(stack)


def own_boots(stack: Stack) -> list[float]:
    """Return the seconds from QEMU's start until the agent answered, of each sandbox that there was, by the logs."""
    begun = _times(stack.run_dir / "log/vmm-manager-qemu.log", event="starting QEMU")
    answered = _times(stack.run_dir / "log/containerd.log", event="sandbox phase", phase="sharing the file system")
    return [answered[request] - begun[request] for request in begun]


def _times(file: Path, **fields: str) -> dict[str, float]:
    """Return when a log has a record with such fields, in seconds, by the record's request, in order."""
    lines = file.read_text().splitlines()
    records = [msgspec.json.decode(line, type=dict[str, object]) for line in lines if line.startswith("{")]
    return {
        str(record["request"]): datetime.fromisoformat(str(record["timestamp"])).timestamp()
        for record in records
        if fields.items() <= record.items()
    }


def ctr_run(stack: Stack, runtime: str) -> float:
    """Run a container that does nothing; return its time in seconds."""
    return timed(lambda: stack.ctr("run", "--rm", "--runtime", runtime, IMAGE, new_name(), "true", check=True))


def ctr_exec(stack: Stack, container: str) -> float:
    """Do nothing in a container that runs; return the time in seconds."""
    return timed(lambda: stack.ctr("task", "exec", "--exec-id", new_name(), container, "true", check=True))


def new_name() -> str:
    """Return an id that was not used before."""
    return f"b{uuid.uuid4().hex[:8]}"


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def interleaved(measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Take each measure in turn, round after round; the first round warms up and is not counted."""
    samples: dict[str, list[float]] = {what: [] for what in measures}
    for number in range(_ROUNDS + 1):
        for what, measure_once in measures.items():
            took = measure_once()
            if number:
                samples[what].append(took)
    return samples


def report(samples: dict[str, list[float]]) -> None:
    """Print medians, 99th percentiles (the worst of so few), and the two ratios."""
    print(f"\n{'seconds':<40} {'median':>8} {'p99':>8} {'n':>4}")
    for what, values in samples.items():
        print(f"{what:<40} {statistics.median(values):8.3f} {max(values):8.3f} {len(values):4}")
    for what, boot in (("cold start", _BOOT), ("what of it is no boot", _OWN_BOOT)):
        over = [run - booted for run, booted in zip(samples[_RUN], samples[boot], strict=True)]
        report_ratio(f"{what}: ({_RUN} - {boot})", over, (_RUNC_RUN, _CRUN_RUN), samples)
    report_ratio(f"boot: {_OWN_BOOT}", samples[_OWN_BOOT], (_BOOT,), samples)
    report_ratio(f"exec: {_EXEC}", samples[_EXEC], (_RUNC_EXEC, _CRUN_EXEC), samples)


def report_ratio(what: str, ours: list[float], peers: tuple[str, ...], samples: dict[str, list[float]]) -> None:
    """Print the median over the rounds of what we take and of what the peers take together, and their ratio."""
    low, took, high = statistics.quantiles(ours, n=4)
    theirs = statistics.median(map(sum, zip(*(samples[peer] for peer in peers), strict=True)))
    print(f"{what} / ({' + '.join(peers)}) = {took:.3f} ({low:.3f} to {high:.3f}) / {theirs:.3f} = {took / theirs:.2f}")


def report_phases(phases: dict[str, float]) -> None:
    """Print where a bare boot's time goes."""
    print(f"\n{f'bare boot: medians of {_PHASE_ROUNDS}, in order':<40} {'seconds':>8}")
    for phase, seconds in phases.items():
        print(f"{phase:<40} {seconds:8.3f}")


def report_memory(shares: list[Share]) -> None:
    """Print what holds the memory of an idle shim."""
    print(f"\n{'idle shim: PSS by mapping':<40} {'KiB':>8}")
    for share in shares:
        print(f"{share.mapping:<40} {share.kib:8}")


def say(step: str) -> None:
    """Tell what is about to be measured: it takes minutes."""
    print(f"bench: {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
