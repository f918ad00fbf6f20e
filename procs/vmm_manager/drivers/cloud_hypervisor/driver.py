"""Starting Cloud Hypervisor, and taking over one that another manager started."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from common import log, paths
from common.config import ClhConfig
from common.errors import HypervisorError, KataError, UnsupportedError
from common.linux import cgroup
from common.services.channel import HybridVsock
from common.services.vmm import (
    BlockSpec,
    CpuSpec,
    MemoryMode,
    MemorySpec,
    NetworkSpec,
    PmemSpec,
    ShareSpec,
    VfioSpec,
    VhostUserDiskSpec,
    Vm,
)
from procs.vmm_manager.drivers import Capabilities
from procs.vmm_manager.drivers.cloud_hypervisor import requests, topology
from procs.vmm_manager.drivers.cloud_hypervisor.api import Api, is_refusal
from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement
from procs.vmm_manager.drivers.cloud_hypervisor.events import EventStream
from procs.vmm_manager.drivers.cloud_hypervisor.machine import ClhMachine
from procs.vmm_manager.drivers.cloud_hypervisor.snapshots import require, restore
from procs.vmm_manager.drivers.cloud_hypervisor.versions import features_of
from procs.vmm_manager.drivers.console import LOG as CONSOLE_LOG
from procs.vmm_manager.drivers.console import Console
from procs.vmm_manager.drivers.probe import Probe
from procs.vmm_manager.drivers.spawn import Process, listening

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.workers import Workers
    from procs.vmm_manager.drivers import Restoring
    from procs.vmm_manager.record import VmRecord

_LOG = "cloud-hypervisor.log"
_START_TIMEOUT_S = 30.0
"""How long each step of a start may take: it loads the kernel, and the host may be busy."""
_LAST_WORDS_S = 1.0
"""How long it may take to end after it has closed its API."""


class ClhDriver:
    """Makes :class:`ClhMachine`; see :class:`procs.vmm_manager.drivers.Driver`."""

    name = "clh"
    capabilities = Capabilities(
        devices=(
            ShareSpec,
            BlockSpec,
            VhostUserDiskSpec,
            PmemSpec,
            VfioSpec,
            NetworkSpec,
            CpuSpec,
            MemorySpec,
        ),
        memory_modes=(MemoryMode.COPY, MemoryMode.ON_DEMAND),
    )

    def __init__(self) -> None:
        self._probe = Probe(requests.probe_argv)

    async def prepare(self) -> None:
        """Find out whether KVM works."""
        await self._probe.prepare(ClhConfig)

    async def start(
        self,
        record: VmRecord,
        workers: Workers,
        on_removed: Callable[[str], None],
        restoring: Restoring | None = None,
    ) -> ClhMachine:
        """Start Cloud Hypervisor and have it boot a VM; return when the guest has begun.

        Raises:
            UnsupportedError: KVM does not work here, or this version is too old.
            HypervisorError: it does not run with this configuration; its own words are in the message.
        """
        config = record.config
        assert isinstance(config, ClhConfig)
        await self._require_kvm(config)
        directory = paths.vm_dir(record.sandbox_id)
        async with AsyncExitStack() as undo:
            console, events = Console(directory), EventStream(directory)
            undo.callback(console.close)
            undo.callback(events.close)
            process = _spawn(record.sandbox_id, config, directory, console, events)
            undo.push_async_callback(process.end)
            api = Api(directory)
            try:
                record.vm = await _boot(record, config, api, process, restoring)
            except KataError as err:
                raise await _explained(err, process, config) from err
            record.save()
            undo.pop_all()
        machine = ClhMachine(record, record.vm, config, process, api, events, console, workers, on_removed)
        machine.watch()
        return machine

    async def adopt(self, record: VmRecord, workers: Workers, on_removed: Callable[[str], None]) -> ClhMachine | None:
        """Take over a running Cloud Hypervisor; None if it is gone or was never finished."""
        if record.vm is None or not isinstance(record.config, ClhConfig):
            return None
        directory = paths.vm_dir(record.sandbox_id)
        process = Process.find(record.vm.process, directory=directory, log=_LOG)
        if process is None:
            return None
        console, events, api = Console(directory), EventStream(directory), Api(directory)
        machine = ClhMachine(record, record.vm, record.config, process, api, events, console, workers, on_removed)
        await machine.take_over()
        return machine

    async def _require_kvm(self, config: ClhConfig) -> None:
        verdict = await self._probe.verdict(config)
        if verdict.accelerator != "kvm":
            raise UnsupportedError(
                f"Cloud Hypervisor needs KVM, which does not work here: {verdict.reason}",
                hint="use a configuration with [hypervisor.qemu], which runs without KVM",
            )


def _spawn(sandbox_id: str, config: ClhConfig, directory: str, console: Console, events: EventStream) -> Process:
    with listening(directory, requests.API_SOCKET) as listener:
        argv = requests.argv(config, api_fd=listener.fileno(), events_fd=events.fd)
        log.get().info("starting Cloud Hypervisor", argv=shlex.join(argv))
        return Process.start(
            argv,
            cgroup=cgroup.path(sandbox_id),
            directory=directory,
            log=_LOG,
            fds=[listener.fileno(), events.fd],
            stdout=console.fd,
        )


async def _boot(record: VmRecord, config: ClhConfig, api: Api, process: Process, restoring: Restoring | None) -> Vm:
    """Have a VM made and booted, or restored; return what callers are told of it."""
    version = await api.ping(timeout_s=_START_TIMEOUT_S)
    features = features_of(version)  # refuses what is too old
    directory = paths.vm_dir(record.sandbox_id)
    confinement = Confinement(config, directory)
    log.get().info("confined by Landlock" if confinement.is_on else "not confined by Landlock")
    if restoring is None:
        await api.put("vm.create", requests.vm_config(config, confinement), timeout_s=_START_TIMEOUT_S)
        await api.put("vm.boot", timeout_s=_START_TIMEOUT_S)
    else:
        require(restoring, version, features)
        await restore(restoring, api, confinement, directory)
    info = await api.get("vm.info")
    return Vm(
        sandbox_id=record.sandbox_id,
        hypervisor=ClhDriver.name,
        version=version,
        accelerator="kvm",
        process=process.identity,
        channel=HybridVsock(socket=f"{directory}/{requests.VSOCK}"),
        console_log=f"{directory}/{CONSOLE_LOG}",
        hotplug_buses=(
            *topology.pci_buses(info["device_tree"], config.default_bridges),
            *topology.part_buses(config),
        ),
        device_manager=record.device_manager,
    )


async def _explained(err: KataError, process: Process, config: ClhConfig) -> KataError:
    """Return why a start failed, with what Cloud Hypervisor printed, which is more if it has ended."""
    if isinstance(err, UnsupportedError):
        return err
    if not is_refusal(err):
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await process.wait()
    what = err.message if process.is_running else "Cloud Hypervisor ended before it ran"
    said = process.output.tail().strip() or "it said nothing"
    return HypervisorError(
        f"{what}: {said}",
        hint=f"check [hypervisor.clh] in the configuration: path {config.path}, kernel {config.kernel}, "
        f"initrd {config.initrd}",
    )
