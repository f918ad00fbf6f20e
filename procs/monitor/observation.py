"""One look at everything: what the services say and what the kernel says about their processes.

A service that is down costs the look one second at most and is reported as down; it never fails the look.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import psutil

from common import paths, shards
from common.bus.wire import Empty
from common.config import HYPERVISORS
from common.errors import KataError
from common.linux import cgroup
from common.services import vmm
from common.services.health import HEALTH, Health

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from common.bus.client import BusClient
    from common.bus.wire import Verb
    from common.services.vmm import Vm

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

_DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """What the kernel says of one process.

    Attributes:
        role: ``service``, ``shim``, ``hypervisor`` or ``virtiofsd``.
        owner: the service's bus name, or the sandbox's id.
        cpu_s: user and system time since its start.
        rss_bytes: resident memory.
        fds: open file descriptors.
        threads: threads.
    """

    role: str
    owner: str
    cpu_s: float
    rss_bytes: int
    fds: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything that one look saw; a service that did not answer has the health None."""

    health: dict[str, Health | None]
    vms: tuple[Vm, ...]
    shims: dict[str, int]
    processes: tuple[ProcessSample, ...]


async def observe(bus: BusClient) -> Observation:
    """Look at every service and every sandbox now."""
    managers = list(_managers())
    services = [*managers, *shards.services()]
    health, vm_lists = await asyncio.gather(
        asyncio.gather(*(_ask(bus, service, HEALTH, Empty()) for service in services)),
        asyncio.gather(*(_ask(bus, service, vmm.LIST_VMS, Empty()) for service in managers)),
    )
    vms = tuple(vm for answer in vm_lists if answer for vm in answer.vms)
    shims = dict(_shims())
    by_service = dict(zip(services, health, strict=True))
    pids = [("service", service, answer.pid) for service, answer in by_service.items() if answer]
    pids += [("shim", sandbox, pid) for sandbox, pid in shims.items()]
    pids += [("hypervisor", vm.sandbox_id, vm.process.pid) for vm in vms]
    pids += [("virtiofsd", vm.sandbox_id, pid) for vm in vms for pid in cgroup.processes(vm.sandbox_id)]
    return Observation(
        health=by_service,
        vms=vms,
        shims=shims,
        processes=tuple(_samples(pids)),
    )


def _managers() -> Iterator[str]:
    """Yield the VM managers that this host has, whether they run or not: each leaves its lock file."""
    for service in map(vmm.service_name, HYPERVISORS):
        if Path(paths.bus_dir(), f"{service}.lock").exists():
            yield service


async def _ask(bus: BusClient, service: str, verb: Verb[Q, R], request: Q) -> R | None:
    """Return the service's answer, or None if it has none within the deadline."""
    try:
        return await bus.call(service, verb, request, timeout_s=_DEADLINE_S)
    except KataError:
        return None


def _shims() -> Iterator[tuple[str, int]]:
    """Yield id and shim's pid of each sandbox on this host."""
    for record in Path(paths.sandboxes_dir()).glob("*/shim.json"):
        try:
            yield record.parent.name, int(json.loads(record.read_text())["pid"])
        except FileNotFoundError:
            continue  # the sandbox ended while we looked


def _samples(pids: Iterable[tuple[str, str, int]]) -> Iterator[ProcessSample]:
    for role, owner, pid in pids:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                if role == "virtiofsd" and process.name() != "virtiofsd":
                    continue
                cpu = process.cpu_times()
                yield ProcessSample(
                    role=role,
                    owner=owner,
                    cpu_s=cpu.user + cpu.system,
                    rss_bytes=process.memory_info().rss,
                    fds=process.num_fds(),
                    threads=process.num_threads(),
                )
        except psutil.NoSuchProcess:
            continue
