"""The VMs of this host: made, found again, ended.

One lock per sandbox orders what changes a VM's life; it is never held while waiting for a guest. The end of a VMM,
whoever caused it, is handled in one place: its cgroup is emptied, its directory removed, ``vm-exited`` published.
What it printed last is remembered until the sandbox is destroyed, for whoever asks why.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from common import log, paths, shards
from common.errors import (
    BugError,
    HypervisorError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
    UsageError,
)
from common.linux import cgroup, mounts
from common.services.vmm import DEVICE_REMOVED, VM_EXITED, DeviceRemoved, VmExited, VmStatus
from procs.vmm_manager import measures, snapshots
from procs.vmm_manager import record as records
from procs.vmm_manager.drivers import PAUSED, RUNNING, Restoring, SnapshotMachine
from procs.vmm_manager.record import VmRecord
from procs.vmm_manager.snapshots import Snapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.bus.events import Publisher
    from common.config import HypervisorConfig
    from common.services.health import Family
    from common.services.vmm import AddDevice, AddedDevice, CreateVm, MemoryMode, RestoreVm, SnapshotVm, Vm
    from common.workers import Workers
    from procs.vmm_manager.drivers import Driver, Machine

_END_TIMEOUT_S = 1.0
"""How long a VMM that does not answer any more may take to end: its socket is closed before its end shows."""
_NO_VM = "a sandbox is over when its VM is; why that ended is in the log of its shim"


class Registry:
    """Owns every VM of one kind of hypervisor."""

    def __init__(self, driver: Driver, publisher: Publisher, workers: Workers) -> None:
        self._driver = driver
        self._publisher = publisher
        self._workers = workers
        self._machines: dict[str, Machine] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._epitaphs: dict[str, VmStatus] = {}

    def machine(self, sandbox_id: str) -> Machine:
        """Return a sandbox's VM.

        Raises:
            NotFoundError: it has none.
        """
        if sandbox_id not in self._machines:
            raise NotFoundError(f"sandbox {sandbox_id} has no running VM", hint=_NO_VM)
        return self._machines[sandbox_id]

    def vms(self) -> tuple[Vm, ...]:
        """Return every running VM."""
        return tuple(machine.vm for machine in self._machines.values() if machine.is_running)

    def metrics(self) -> tuple[Family, ...]:
        """Return what the running VMs' hypervisors count of themselves."""
        return measures.families(self._driver.name, [item for item in self._machines.values() if item.is_running])

    async def recover(self) -> None:
        """Take over what an earlier manager left; end what cannot be taken over.

        Other hypervisors' VMs are their managers'. A record that cannot be read is nobody's, so everybody's.
        """
        async with asyncio.TaskGroup() as group:
            for record in records.load_all():
                if record.config is None or record.config.name == self._driver.name:
                    group.create_task(self._recover(record))

    async def create(self, request: CreateVm) -> Vm:
        """Start a VM; a sandbox that has one keeps it, so that the call may be repeated.

        Raises:
            NotFoundError: the sandbox's directory does not exist.
            UsageError: the configuration is another hypervisor's.
            UnsupportedError: this hypervisor cannot wait with the boot.
            HypervisorError: the VM did not start; nothing of it is left.
        """
        if request.is_held and not self._driver.capabilities.can_hold:
            raise UnsupportedError(
                f"{self._driver.name} cannot plug devices before a guest boots", hint="plug them while it runs"
            )
        return await self._make(request.sandbox_id, request.config, None, is_held=request.is_held)

    async def restore(self, request: RestoreVm) -> Vm:
        """Start a VM from a snapshot; a sandbox that has one keeps it, so that the call may be repeated.

        Raises:
            UnsupportedError: this hypervisor, or this version, cannot do that.
            NotFoundError, UsageError: there is no snapshot, or it is another hypervisor's; see :meth:`create` too.
            HypervisorError: see :meth:`create`.
        """
        self._require(request.memory)
        snapshot = await asyncio.to_thread(snapshots.load, request.directory)
        return await self._make(request.sandbox_id, snapshot.config, Restoring(snapshot, request.memory))

    async def snapshot(self, request: SnapshotVm) -> None:
        """Write a paused VM into a directory, and then what it is; of one that cannot be written nothing is left.

        Raises:
            UnsupportedError: this hypervisor takes no snapshots.
            NotFoundError: the sandbox has no running VM, or there is no such directory.
            StateError: the VM runs, or has devices: what is behind them is not written, and may be somebody else's.
            UsageError: the directory is not empty.
            HypervisorError: the hypervisor did not do it.
        """
        self._require(None)
        machine = self._living(request.sandbox_id)
        assert isinstance(machine, SnapshotMachine), "the capabilities say so"
        if await machine.runstate() != PAUSED:
            raise StateError(f"the VM of sandbox {request.sandbox_id} is not paused", hint="`pause_vm` comes first")
        if present := await machine.devices.present():
            names = ", ".join(device.hypervisor_id for device in present)
            raise StateError(f"the VM of sandbox {request.sandbox_id} has devices: {names}", hint="detach them first")
        await asyncio.to_thread(snapshots.require_empty, request.directory)
        config = machine.config
        try:
            await machine.snapshot(request.directory)
            written = Snapshot(version=machine.vm.version, config=config, directory=request.directory)
            await asyncio.to_thread(written.save)
        except BaseException as err:
            await asyncio.to_thread(snapshots.clear, request.directory)
            if isinstance(err, OSError):
                raise HypervisorError(f"cannot write a snapshot into {request.directory}: {err}") from err
            raise

    async def _make(
        self, sandbox_id: str, config: HypervisorConfig, restoring: Restoring | None, *, is_held: bool = False
    ) -> Vm:
        wanted = config.name
        if wanted != self._driver.name:
            raise UsageError(f"this is the manager of {self._driver.name}, and the configuration is {wanted}'s")
        async with self._lock(sandbox_id):
            machine = self._machines.get(sandbox_id)
            if machine is not None and machine.is_running:
                return machine.vm
            if machine is not None:
                await self._bury(machine, sandbox_id)
            if not Path(paths.sandbox_dir(sandbox_id)).is_dir():
                raise NotFoundError(f"sandbox {sandbox_id} has no directory", hint="its shim makes it in `start`")
            self._epitaphs.pop(sandbox_id, None)
            await _remove_remains(sandbox_id)
            try:
                machine = await self._start(sandbox_id, config, restoring, is_held=is_held)
            except OSError as err:
                await _remove_remains(sandbox_id)
                raise HypervisorError(f"cannot start the VM of {sandbox_id}: {err}") from err
            except BaseException:
                await _remove_remains(sandbox_id)
                raise
            self._enter(machine, sandbox_id)
            return machine.vm

    async def describe(self, sandbox_id: str) -> VmStatus:
        """Return what is true of a VM now, or was at its end.

        Raises:
            NotFoundError: the sandbox has none and had none.
        """
        if sandbox_id in self._machines:
            return await _status(self._machines[sandbox_id])
        self._forget_vanished()
        if sandbox_id in self._epitaphs:
            return self._epitaphs[sandbox_id]
        raise NotFoundError(f"sandbox {sandbox_id} has no VM")

    async def destroy(self, sandbox_id: str) -> None:
        """End a VM and wait until nothing of it is left; a sandbox without one is fine."""
        async with self._lock(sandbox_id):
            await _remove_remains(sandbox_id)
            if sandbox_id in self._machines:
                await self._machines[sandbox_id].wait_end()
                await self._bury(self._machines[sandbox_id], sandbox_id)
            self._epitaphs.pop(sandbox_id, None)

    async def pause(self, sandbox_id: str) -> None:
        """Stop a guest's processors; one that is paused stays so.

        Everything in it stands still, its agent too, and it lets no device go before it is resumed.

        Raises:
            NotFoundError: the sandbox has no running VM.
            HypervisorError, DeadlineError: the hypervisor did not do it.
        """
        machine = self._living(sandbox_id)
        await _bring(machine, PAUSED, machine.pause)

    async def resume(self, sandbox_id: str) -> None:
        """Let a guest's processors go on; one that runs goes on. Raises as :meth:`pause` does."""
        machine = self._living(sandbox_id)
        await _bring(machine, RUNNING, machine.resume)

    async def add_device(self, request: AddDevice) -> AddedDevice:
        """Plug a device into a running VM; one attach brings one device, however often it is asked for.

        While the caller waits, the bus has repeats join the call. A manager that died is repeated to its successor: it
        may have died with the answer, or the hypervisor have carried out its request since.
        """
        if not isinstance(request.spec, self._driver.capabilities.devices):
            kind = type(request.spec).__struct_config__.tag
            raise UnsupportedError(f"{self._driver.name} cannot plug a {kind} device into a running guest")
        try:
            devices = self.machine(request.sandbox_id).devices
            return await devices.find(request.serial) or await devices.add(request)
        except OSError as err:
            raise HypervisorError(f"cannot plug a device into {request.sandbox_id}: {err}") from err

    def _living(self, sandbox_id: str) -> Machine:
        """Return a sandbox's VM whose VMM lives: one that has just ended is not yet buried.

        Raises:
            NotFoundError: it has none.
        """
        machine = self.machine(sandbox_id)
        if not machine.is_running:
            raise NotFoundError(f"the VM of sandbox {sandbox_id} has ended", hint=_NO_VM)
        return machine

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        """Return the lock of a sandbox, which lives as long as somebody holds it or waits for it."""
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    async def _recover(self, record: VmRecord) -> None:
        sandbox_id = record.sandbox_id
        with log.bound(request=record.request_id, sandbox=sandbox_id):
            machine = None
            try:
                machine = await self._driver.adopt(record, self._workers, self._announcer(record))
            except FileNotFoundError:
                pass  # the sandbox is being cleaned up
            except OSError as err:  # its files are not what we left: the other VMs must not suffer
                log.get().error("a VM cannot be taken over", error=str(err))
            if machine is not None:
                log.get().info("VM taken over")
                self._enter(machine, sandbox_id)
                return
            log.get().info("remains of a VM found")
            await _try_remove_remains(sandbox_id)
            await self._tell_exited(sandbox_id, record.device_manager)

    def _require(self, memory: MemoryMode | None) -> None:
        """Refuse snapshots, or a way to get memory from one, where the hypervisor does not have them."""
        modes = self._driver.capabilities.memory_modes
        if not modes:
            hint = "those of [hypervisor.clh] and [hypervisor.firecracker] do"
            raise UnsupportedError(f"VMs of {self._driver.name} have no snapshots here", hint=hint)
        if memory is not None and memory not in modes:
            hint = f"it can be had {' or '.join(modes)}"
            raise UnsupportedError(f"{self._driver.name} cannot give a guest its memory {memory}", hint=hint)

    async def _start(
        self, sandbox_id: str, config: HypervisorConfig, restoring: Restoring | None, *, is_held: bool
    ) -> Machine:
        record = VmRecord(
            sandbox_id=sandbox_id,
            request_id=log.request_id.get(),
            config=config,
            is_held=is_held,
            device_manager=shards.of(sandbox_id),
        )
        Path(paths.vm_dir(sandbox_id)).mkdir(mode=0o700)
        cgroup.create(sandbox_id)
        record.save()
        return await self._driver.start(record, self._workers, self._announcer(record), restoring)

    def _announcer(self, record: VmRecord) -> Callable[[str], None]:
        def announce(hypervisor_id: str) -> None:
            removed = DeviceRemoved(sandbox_id=record.sandbox_id, hypervisor_id=hypervisor_id)
            self._workers.spawn(self._publisher.publish(DEVICE_REMOVED, removed, audience=record.device_manager))

        return announce

    def _enter(self, machine: Machine, sandbox_id: str) -> None:
        self._machines[sandbox_id] = machine
        self._workers.spawn(self._watch(machine, sandbox_id))

    async def _watch(self, machine: Machine, sandbox_id: str) -> None:
        """Wait for the end of a VM and clean up after it."""
        await machine.wait_end()
        async with self._lock(sandbox_id):
            if self._machines.get(sandbox_id) is machine:
                await self._bury(machine, sandbox_id)

    async def _bury(self, machine: Machine, sandbox_id: str) -> None:
        """Remember how a VM ended, remove what is left of it, tell whoever listens; the sandbox's lock is held."""
        self._epitaphs[sandbox_id] = await _status(machine)
        self._forget_vanished()
        del self._machines[sandbox_id]
        await _try_remove_remains(sandbox_id)
        log.get().info("VM ended", sandbox=sandbox_id)
        await self._tell_exited(sandbox_id, machine.vm.device_manager)

    async def _tell_exited(self, sandbox_id: str, device_manager: str) -> None:
        await self._publisher.publish(VM_EXITED, VmExited(sandbox_id=sandbox_id), audience=device_manager)

    def _forget_vanished(self) -> None:
        """Drop what is remembered of sandboxes that the shim's `delete` has removed: nobody can ask for them."""
        for sandbox_id in [name for name in self._epitaphs if not Path(paths.sandbox_dir(name)).is_dir()]:
            del self._epitaphs[sandbox_id]


async def _bring(machine: Machine, wanted: str, act: Callable[[], Awaitable[None]]) -> None:
    """Have a VM in a state, whether or not it is there already; if an answer is lost, the state says what was done.

    Raises:
        NotFoundError: the VM ended meanwhile.
        HypervisorError, DeadlineError: it is not in that state.
    """
    try:
        if await machine.runstate() != wanted:
            await act()
    except KataError as err:
        if await _runstate_again(machine) == wanted:
            return
        if not machine.is_running:
            raise NotFoundError(f"the VM of sandbox {machine.vm.sandbox_id} ended meanwhile") from err
        raise


async def _runstate_again(machine: Machine) -> str:
    """Return the state of a VM after an error; empty if its VMM does not answer, which then is given time to end."""
    try:
        return await machine.runstate()
    except KataError:
        with suppress(TimeoutError):
            await asyncio.wait_for(machine.wait_end(), _END_TIMEOUT_S)
        return ""


async def _status(machine: Machine) -> VmStatus:
    runstate = "gone"
    if machine.is_running:
        with suppress(KataError):
            runstate = await machine.runstate()
    console_tail = await machine.console_tail()
    return VmStatus(
        vm=machine.vm,
        is_running=machine.is_running,
        runstate=runstate,
        console_tail=console_tail,
        log_tail=machine.log_tail(),
    )


async def _remove_remains(sandbox_id: str) -> None:
    """Kill all processes of a VM and remove its directory. The shim's `delete` may be doing the same.

    Raises:
        BugError: a process does not end, or something stays mounted; what it holds is left alone.
    """
    try:
        await asyncio.to_thread(cgroup.kill, sandbox_id)
        await asyncio.to_thread(mounts.unmount_below, paths.vm_dir(sandbox_id))
    except (TimeoutError, OSError) as err:
        raise BugError(str(err)) from err
    shutil.rmtree(paths.vm_dir(sandbox_id), onerror=_accept_missing)


async def _try_remove_remains(sandbox_id: str) -> None:
    try:
        await _remove_remains(sandbox_id)
    except BugError as err:
        log.get().error("remains of a VM stay", sandbox=sandbox_id, error=str(err))


def _accept_missing(_: object, path: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
    """Let ``shutil.rmtree`` go on when somebody else has removed a file."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]
