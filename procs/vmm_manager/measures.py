"""What VMMs count of themselves, as metrics. Pure.

Names are upstream's: ``kata_<hypervisor>_<group>`` with the label ``item``; ours has the sandbox beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.services.health import Family, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from procs.vmm_manager.drivers import Machine


def families(hypervisor: str, machines: Iterable[Machine]) -> tuple[Family, ...]:
    """Return a family for each group that any VMM counts."""
    samples: dict[str, list[Sample]] = {}
    for machine in machines:
        for group, items in machine.counters.items():
            name = f"kata_{hypervisor}_{group}"
            samples.setdefault(name, []).extend(
                Sample(name=name, labels={"sandbox_id": machine.vm.sandbox_id, "item": item}, value=value)
                for item, value in items.items()
            )
    return tuple(
        Family(name=name, help=f"What {hypervisor} counts of itself.", kind="gauge", samples=tuple(values))
        for name, values in samples.items()
    )
