"""The VMs of this host: made, found again, ended.

One lock per sandbox orders what changes a VM's life; it is never held while waiting for a guest. The end of a VMM,
whoever caused it, is handled in one place: its cgroup is emptied, its directory removed, ``vm-exited`` published.
What it printed last is remembered until the sandbox is destroyed, for whoever asks why.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.errors import BugError, HypervisorError, KataError, NotFoundError
from common.linux import cgroup
from common.services.vmm import DEVICE_REMOVED, VM_EXITED, DeviceRemoved, VmExited, VmStatus
from procs.vmm_manager import record as records
from procs.vmm_manager.record import VmRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.bus.events import Publisher
    from common.services.vmm import AddDevice, AddedDevice, CreateVm, Vm
    from common.workers import Workers
    from procs.vmm_manager.drivers import Driver, Machine

_MAX_EPITAPHS = 256


class Registry:
    """Owns every VM of one kind of hypervisor."""

    def __init__(self, driver: Driver, publisher: Publisher, workers: Workers) -> None:
        self._driver = driver
        self._publisher = publisher
        self._workers = workers
        self._machines: dict[str, tuple[Machine, VmRecord]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._epitaphs: OrderedDict[str, VmStatus] = OrderedDict()

    def machine(self, sandbox_id: str) -> Machine:
        """Return a sandbox's VM.

        Raises:
            NotFoundError: it has none.
        """
        return self._entry(sandbox_id)[0]

    def vms(self) -> tuple[Vm, ...]:
        """Return every running VM."""
        return tuple(machine.vm for machine, _ in self._machines.values())

    async def recover(self) -> None:
        """Take over what an earlier manager left; end what cannot be taken over."""
        for record in records.load_all():
            machine = await self._driver.adopt(record, self._workers, self._announcer(record.sandbox_id))
            if machine is not None:
                log.get().info("VM taken over", sandbox=record.sandbox_id)
                self._enter(machine, record)
            else:
                log.get().info("remains of a VM removed", sandbox=record.sandbox_id)
                await _remove_remains(record.sandbox_id)
                await self._publisher.publish(VM_EXITED, VmExited(sandbox_id=record.sandbox_id))

    async def create(self, request: CreateVm) -> Vm:
        """Start a VM; a sandbox that has one keeps it, so that the call may be repeated.

        Raises:
            NotFoundError: the sandbox's directory does not exist.
            HypervisorError: the VM did not start; nothing of it is left.
        """
        sandbox_id = request.sandbox_id
        async with self._locks[sandbox_id]:
            if sandbox_id in self._machines:
                return self._machines[sandbox_id][0].vm
            if not Path(paths.sandbox_dir(sandbox_id)).is_dir():
                raise NotFoundError(f"sandbox {sandbox_id} has no directory", hint="its shim makes it in `start`")
            await _remove_remains(sandbox_id)
            record = VmRecord(sandbox_id=sandbox_id)
            try:
                Path(paths.vm_dir(sandbox_id)).mkdir(mode=0o700)
                cgroup.create(sandbox_id)
                record.save()
                machine = await self._driver.start(record, request.config, self._workers, self._announcer(sandbox_id))
            except OSError as err:
                await _remove_remains(sandbox_id)
                raise HypervisorError(f"cannot start the VM of {sandbox_id}: {err}") from err
            except BaseException:
                await _remove_remains(sandbox_id)
                raise
            self._enter(machine, record)
            return machine.vm

    async def describe(self, sandbox_id: str) -> VmStatus:
        """Return what is true of a VM now, or was at its end."""
        if sandbox_id in self._epitaphs:
            return self._epitaphs[sandbox_id]
        return await _status(self.machine(sandbox_id))

    async def destroy(self, sandbox_id: str) -> None:
        """End a VM and wait until nothing of it is left; a sandbox without one is fine."""
        async with self._locks[sandbox_id]:
            entry = self._machines.get(sandbox_id)
            if entry is not None:
                await asyncio.to_thread(cgroup.kill, sandbox_id)
                await entry[0].wait_end()
            await _remove_remains(sandbox_id)
            self._epitaphs.pop(sandbox_id, None)
        self._locks.pop(sandbox_id, None)

    async def add_device(self, request: AddDevice) -> AddedDevice:
        """Plug a device into a running VM."""
        machine, record = self._entry(request.sandbox_id)
        hypervisor_id = await machine.add_device(request)
        return records.added(hypervisor_id, record)

    def _entry(self, sandbox_id: str) -> tuple[Machine, VmRecord]:
        if sandbox_id not in self._machines:
            raise NotFoundError(f"sandbox {sandbox_id} has no running VM")
        return self._machines[sandbox_id]

    def _announcer(self, sandbox_id: str) -> Callable[[str], None]:
        def announce(hypervisor_id: str) -> None:
            removed = DeviceRemoved(sandbox_id=sandbox_id, hypervisor_id=hypervisor_id)
            self._workers.spawn(self._publisher.publish(DEVICE_REMOVED, removed))

        return announce

    def _enter(self, machine: Machine, record: VmRecord) -> None:
        self._machines[record.sandbox_id] = (machine, record)
        self._workers.spawn(self._watch(machine, record.sandbox_id))

    async def _watch(self, machine: Machine, sandbox_id: str) -> None:
        """Wait for the end of a VM and clean up after it."""
        await machine.wait_end()
        if Path(paths.sandbox_dir(sandbox_id)).is_dir():
            self._remember(await _status(machine, is_running=False))
        await _remove_remains(sandbox_id)
        del self._machines[sandbox_id]
        log.get().info("VM ended", sandbox=sandbox_id)
        await self._publisher.publish(VM_EXITED, VmExited(sandbox_id=sandbox_id))

    def _remember(self, status: VmStatus) -> None:
        self._epitaphs[status.vm.sandbox_id] = status
        while len(self._epitaphs) > _MAX_EPITAPHS:
            self._epitaphs.popitem(last=False)


async def _status(machine: Machine, *, is_running: bool = True) -> VmStatus:
    runstate = "gone"
    if is_running:
        with suppress(KataError):
            runstate = await machine.runstate()
    return VmStatus(
        vm=machine.vm,
        is_running=is_running,
        runstate=runstate,
        console_tail=await machine.console_tail(),
        log_tail=machine.log_tail(),
    )


async def _remove_remains(sandbox_id: str) -> None:
    """Kill all processes of a VM and remove its directory.

    Raises:
        BugError: a process does not end; what it holds is left alone.
    """
    try:
        await asyncio.to_thread(cgroup.kill, sandbox_id)
    except TimeoutError as err:
        raise BugError(str(err)) from err
    with suppress(FileNotFoundError):
        shutil.rmtree(paths.vm_dir(sandbox_id))
