"""Starting Firecracker, and taking over a Firecracker that another manager started.

What cannot work is refused before anything is started: a version that is too old, disks on PCI with one that cannot
plug them, a host without KVM.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.config import FirecrackerConfig
from common.errors import DeadlineError, HypervisorError, UnavailableError, UnsupportedError
from common.linux import cgroup, inotify
from common.services.channel import HybridVsock
from common.services.vmm import BlockSpec, MemoryMode, NetworkSpec, Vm
from procs.vmm_manager.drivers import Capabilities, console
from procs.vmm_manager.drivers.console import Console
from procs.vmm_manager.drivers.firecracker import boot, places, snapshots, versions
from procs.vmm_manager.drivers.firecracker.api import SOCKET, Api
from procs.vmm_manager.drivers.firecracker.jail import Jail
from procs.vmm_manager.drivers.firecracker.machine import LOG, METRICS, FirecrackerMachine
from procs.vmm_manager.drivers.output import Output
from procs.vmm_manager.drivers.probe import KERNEL_PARAMETERS, Probe
from procs.vmm_manager.drivers.spawn import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.workers import Workers
    from procs.vmm_manager.drivers import Restoring
    from procs.vmm_manager.drivers.firecracker.versions import Features
    from procs.vmm_manager.record import VmRecord

_OUTPUT = "firecracker.log"
"""What the jailer prints, and Firecracker beside its log."""
_START_TIMEOUT_S = 30.0
"""How long it may take until Firecracker's socket is there: the jailer copies the program first."""
_VERSION_TIMEOUT_S = 10.0
_LAST_WORDS_S = 1.0
_LISTENS_SOON_S = 0.001
"""Between bind(2) and listen(2) a socket is there and refuses."""


class FirecrackerDriver:
    """Makes :class:`FirecrackerMachine`; see :class:`procs.vmm_manager.drivers.Driver`."""

    name = "firecracker"
    capabilities = Capabilities(devices=(BlockSpec, NetworkSpec), memory_modes=(MemoryMode.ON_DEMAND,), can_hold=True)

    def __init__(self) -> None:
        self._probe = Probe(_probe_argv)
        self._versions: dict[tuple[str, int], str] = {}

    async def prepare(self) -> None:
        """Find out whether KVM works."""
        await self._probe.prepare(FirecrackerConfig)

    async def start(
        self,
        record: VmRecord,
        workers: Workers,
        on_removed: Callable[[str], None],
        restoring: Restoring | None = None,
    ) -> FirecrackerMachine:
        """Start Firecracker and its VM; the guest boots meanwhile.

        Raises:
            UnsupportedError: this version or this host cannot do it; nothing was started.
            HypervisorError: Firecracker does not run with this configuration; its own words are in the message.
        """
        config = record.config
        assert isinstance(config, FirecrackerConfig)
        features = await self._require(config)
        if record.is_held and boot.is_on_pci(config):
            raise UnsupportedError(
                "a VM of Firecracker on PCI does not wait with its boot", hint="plug devices while the guest runs"
            )
        if restoring is not None and restoring.snapshot.version != features.version:
            raise UnsupportedError(
                f"Firecracker {features.version} cannot read a snapshot of {restoring.snapshot.version}",
                hint="take one with this version",
            )
        jail = Jail(record.sandbox_id, config)
        jail.make()
        printed = Console(paths.vm_dir(record.sandbox_id))
        async with AsyncExitStack() as undo:
            undo.callback(printed.close)
            with inotify.watching(jail.root) as root:
                process = _spawn(record.sandbox_id, config, jail, printed)
                undo.push_async_callback(process.end)
                await _boot(root, process, printed, jail, record, restoring)
            if not record.is_held:
                jail.forget_boot()
            record.vm = _vm(record, features, process, jail, config)
            record.save()
            undo.pop_all()
        return FirecrackerMachine(record, record.vm, config, process, printed, jail, on_removed)

    async def adopt(
        self, record: VmRecord, workers: Workers, on_removed: Callable[[str], None]
    ) -> FirecrackerMachine | None:
        """Take over a running Firecracker; None if it is gone or was never finished."""
        if record.vm is None or not isinstance(record.config, FirecrackerConfig):
            return None
        directory = paths.vm_dir(record.sandbox_id)
        process = Process.find(record.vm.process, directory=directory, log=_OUTPUT)
        if process is None:
            return None
        jail, printed = Jail(record.sandbox_id, record.config), Console(directory)
        machine = FirecrackerMachine(record, record.vm, record.config, process, printed, jail, on_removed)
        await machine.take_over()
        return machine

    async def _require(self, config: FirecrackerConfig) -> Features:
        """Return what the configured Firecracker can do, if that is enough and this host can run it."""
        features = versions.features(await self._version(config.path))
        if boot.is_on_pci(config) and not features.has_pci_hotplug:
            raise UnsupportedError(
                f"Firecracker {features.version} cannot plug disks on PCI, which 1.16 and later can",
                hint='set hypervisor.firecracker.block_device_driver to "virtio-mmio"',
            )
        verdict = await self._probe.verdict(config)
        if verdict.accelerator != "kvm":
            raise UnsupportedError(
                f"Firecracker needs KVM, which does not work on this host: {verdict.reason}",
                hint="use [hypervisor.qemu], which also runs without KVM",
            )
        return features

    async def _version(self, path: str) -> str:
        """Return what a program says of itself; asked again when it was replaced."""
        known = (path, Path(path).stat().st_mtime_ns)
        if known not in self._versions:
            asked = await asyncio.create_subprocess_exec(path, "--version", stdout=asyncio.subprocess.PIPE)
            async with asyncio.timeout(_VERSION_TIMEOUT_S):
                text, _ = await asked.communicate()
            self._versions[known] = versions.printed(text.decode(errors="replace"))
        return self._versions[known]


def _probe_argv(config: FirecrackerConfig) -> list[str]:
    """Return the command that boots the guest's kernel for :class:`procs.vmm_manager.drivers.probe.Probe`."""
    file = Path(paths.run_dir()) / "probe-firecracker.json"
    source = {"kernel_image_path": config.kernel, "boot_args": f"{KERNEL_PARAMETERS} reboot=k"}
    machine = {"vcpu_count": 1, "mem_size_mib": 256}
    file.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
    return [config.path, "--no-api", "--config-file", str(file)]


def _spawn(sandbox_id: str, config: FirecrackerConfig, jail: Jail, printed: Console) -> Process:
    for name in (LOG, METRICS):
        Output(jail.root / name).close()
        jail.hand_over(name)
    level = "Debug" if config.enable_debug else "Error"
    arguments = ["--api-sock", SOCKET, "--log-path", LOG, "--level", level, "--show-level", "--metrics-path", METRICS]
    if boot.is_on_pci(config):
        arguments.append("--enable-pci")
    argv = jail.argv(*arguments)
    log.get().info("starting Firecracker", argv=shlex.join(argv))
    return Process.start(
        argv,
        cgroup=cgroup.path(sandbox_id),
        directory=paths.vm_dir(sandbox_id),
        log=_OUTPUT,
        fds=[],
        stdout=printed.fd,
    )


async def _boot(
    root: inotify.Directory,
    process: Process,
    printed: Console,
    jail: Jail,
    record: VmRecord,
    restoring: Restoring | None,
) -> None:
    """Configure and start the VM of a Firecracker that was just started, or have it go on from a snapshot.

    One that is held is only configured.
    """
    api, config = Api(str(jail.root)), record.config
    assert isinstance(config, FirecrackerConfig)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await _wait_listening(root, process, api)
        if restoring is not None:
            await snapshots.restore(api, jail, process.identity.pid, restoring.snapshot.directory)
            return
        for request in boot.requests(config):
            await api.put(request.path, request.body)
        if not record.is_held:
            await boot.start(api)
    except (HypervisorError, UnavailableError, DeadlineError, TimeoutError) as err:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await process.wait()
        what = "Firecracker ended before it ran" if not process.is_running else str(err) or "it did not listen in time"
        said = f"{printed.tail()}{process.output.tail()}".strip() or "it said nothing"
        raise HypervisorError(
            f"{what}: {said}",
            hint=f"check [hypervisor.firecracker] in the configuration: path {config.path}, jailer_path "
            f"{config.jailer_path!r}, kernel {config.kernel} (an uncompressed ELF vmlinux), initrd {config.initrd}",
        ) from err


async def _wait_listening(root: inotify.Directory, process: Process, api: Api) -> None:
    """Wait until the API answers.

    Raises:
        UnavailableError: the process has ended.
    """
    async with asyncio.TaskGroup() as group:
        appearing = group.create_task(root.wait_for(SOCKET))
        ending = group.create_task(process.wait())
        await asyncio.wait((appearing, ending), return_when=asyncio.FIRST_COMPLETED)
        appearing.cancel()
        ending.cancel()
    while True:
        try:
            await api.get("/version")
        except UnavailableError:
            if not process.is_running:
                raise
            await asyncio.sleep(_LISTENS_SOON_S)
        else:
            return


def _vm(record: VmRecord, features: Features, process: Process, jail: Jail, config: FirecrackerConfig) -> Vm:
    return Vm(
        sandbox_id=record.sandbox_id,
        hypervisor=FirecrackerDriver.name,
        version=features.version,
        accelerator="kvm",
        process=process.identity,
        channel=HybridVsock(socket=str(jail.root / boot.VSOCK)),
        console_log=f"{paths.vm_dir(record.sandbox_id)}/{console.LOG}",
        hotplug_buses=places.of(config).buses,
        device_manager=record.device_manager,
    )
