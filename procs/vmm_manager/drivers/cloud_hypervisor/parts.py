"""Processors and memory of a VM that came after its boot: plugged, unplugged, accounted for.

Cloud Hypervisor has no such devices, only totals (``vm.resize``). So the devices are those of the VM's record, with our
names, and a total is what the VM boots with and the sizes of those that have not been asked to leave. Which processor
or block of memory the guest gives back is its own affair: one is as good as another.

=================  =========================================  =========================================================
total              was asked for: in ``vm.info``              is true
=================  =========================================  =========================================================
processors         ``config.cpus.boot_vcpus``                 when asking for it again is not refused with "busy" (429)
memory, virtio-mem ``config.memory``: size, hotplugged size   ``memory_actual_size``
memory, ACPI       ``config.memory.size``                     at once: it only ever comes
=================  =========================================  =========================================================

The guest is told by ACPI, or by virtio-mem, and gives back in its own time, or never. Nothing tells when it has: so
while a removal is awaited, and only then, the total is asked for, at intervals that grow with the time that has passed.
While processors are awaited Cloud Hypervisor takes no other total of them, but the one that was true before: that it
accepts, and the guest gives back all the same. So nothing is asked for then: a removal that comes meanwhile is asked
for when that is over, and an add waits as long as any request does.

Source: ``Vm::resize`` in vmm/src/vm.rs, vmm/src/cpu.rs, vmm/src/memory_manager.rs and virtio-devices/src/mem.rs of
v51.1 and v53.0.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from common import log
from common.errors import (
    ExhaustedError,
    KataError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from common.services.vmm import AddedDevice, CpuSpec, MemorySpec, PresentDevice
from procs.vmm_manager.drivers.cloud_hypervisor.api import TIMEOUT_S, is_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from common.config import ClhConfig
    from common.services.vmm import AddDevice, DeviceSpec, HotplugBus
    from common.workers import Workers
    from procs.vmm_manager.drivers.cloud_hypervisor.api import Api
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import DeviceRecord, VmRecord

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 30.0
"""What lies between two questions whether a guest has given back; each is twice the one before."""


class Total:
    """One total that Cloud Hypervisor has.

    Attributes:
        spec: the type that describes a part of it.
        prefix: what our names of its parts begin with.
        kept: why what came cannot go, or nothing.
        is_one_at_a_time: whether nothing may be added while the guest is to give back.
    """

    spec: ClassVar[type]
    prefix: ClassVar[str]
    kept: str = ""
    is_one_at_a_time: ClassVar[bool] = False

    def __init__(self, config: ClhConfig, api: Api) -> None:
        self._config = config
        self._api = api

    @property
    def at_boot(self) -> int:
        """What the VM boots with."""
        raise NotImplementedError

    def size(self, spec: DeviceSpec) -> int:
        """Return how much of the total a part is."""
        raise NotImplementedError

    def require(self, total: int) -> None:
        """Raise :class:`ExhaustedError` if the VM can never have so much."""

    def asked(self, info: dict[str, Any]) -> int:
        """Return the total that was last accepted."""
        raise NotImplementedError

    async def actual(self, info: dict[str, Any]) -> int | None:
        """Return the total that is true, or None if the guest has not given back all that it was asked for."""
        raise NotImplementedError

    async def ask(self, total: int) -> None:
        """Ask for a total."""
        raise NotImplementedError


class Cpus(Total):
    """Processors."""

    spec: ClassVar[type] = CpuSpec
    prefix = "cpu-"
    is_one_at_a_time = True

    @property
    def at_boot(self) -> int:
        """See :class:`Total`."""
        return self._config.default_vcpus

    def size(self, _spec: DeviceSpec) -> int:
        """See :class:`Total`."""
        return 1

    def asked(self, info: dict[str, Any]) -> int:
        """See :class:`Total`."""
        return int(info["config"]["cpus"]["boot_vcpus"])

    async def actual(self, info: dict[str, Any]) -> int | None:
        """See :class:`Total`. Asking for what was asked for changes nothing, and is refused while it is not yet so."""
        try:
            await self.ask(self.asked(info))
        except UnavailableError as err:
            if not is_refusal(err):
                raise
            return None
        return self.asked(info)

    async def ask(self, total: int) -> None:
        """See :class:`Total`."""
        await self._api.put("vm.resize", {"desired_vcpus": total}, is_patient=False)


class Memory(Total):
    """Memory, in bytes."""

    spec: ClassVar[type] = MemorySpec
    prefix = "memory-"

    def __init__(self, config: ClhConfig, api: Api) -> None:
        super().__init__(config, api)
        self.kept = "" if config.enable_virtio_mem else "memory that came by ACPI stays (see enable_virtio_mem)"

    @property
    def at_boot(self) -> int:
        """See :class:`Total`."""
        return self._config.default_memory << 20

    def size(self, spec: DeviceSpec) -> int:
        """See :class:`Total`."""
        assert isinstance(spec, MemorySpec)
        return spec.size_mib << 20

    def require(self, total: int) -> None:
        """See :class:`Total`."""
        if total > self._config.max_memory << 20:
            raise ExhaustedError(
                f"the VM can have {self._config.max_memory} MiB of memory and not {total >> 20}",
                hint="see default_maxmemory of [hypervisor.clh]",
            )

    def asked(self, info: dict[str, Any]) -> int:
        """See :class:`Total`."""
        memory = info["config"]["memory"]
        return int(memory["size"]) + int(memory.get("hotplugged_size") or 0)

    async def actual(self, info: dict[str, Any]) -> int | None:
        """See :class:`Total`."""
        return int(info["memory_actual_size"])

    async def ask(self, total: int) -> None:
        """See :class:`Total`."""
        await self._api.put("vm.resize", {"desired_ram": total})


class Parts:
    """Plugs and unplugs parts of totals; owns their devices in the record.

    One lock orders what is asked; it is never held while a guest is awaited.

    Args:
        record: of the VM.
        buses: where they can be plugged.
        totals: that there are.
        api: of this VM.
        vmm: its process.
        workers: who runs what awaits removals.
        on_removed: called with our name of each part that is gone.
    """

    def __init__(
        self,
        record: VmRecord,
        buses: Iterable[HotplugBus],
        totals: Iterable[Total],
        api: Api,
        vmm: Process,
        workers: Workers,
        on_removed: Callable[[str], None],
    ) -> None:
        self._record = record
        self._slots = {bus.name: bus.slots for bus in buses}
        self._totals: dict[type, Total] = {total.spec: total for total in totals}
        self._api = api
        self._vmm = vmm
        self._workers = workers
        self._on_removed = on_removed
        self._lock = asyncio.Lock()
        self._awaited: dict[Total, asyncio.Event] = {}

    def has(self, name: str) -> bool:
        """Return whether a device of the record is a part of a total."""
        device = self._record.devices.get(name)
        return device is not None and type(device.spec) in self._totals

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the part of an attach, if Cloud Hypervisor has it."""
        name = self._record.name_of(serial)
        if name is None or not self.has(name):
            return None
        await self.reconcile()
        return AddedDevice(hypervisor_id=name) if self.has(name) else None

    async def add(self, request: AddDevice) -> AddedDevice:
        """Add to a total.

        Raises:
            UsageError: there is no such slot.
            AlreadyExistsError: the slot is taken.
            ExhaustedError: the VM can never have so much.
            UnavailableError: a guest has been asked to give processors back, and has not yet; nothing was done.
            HypervisorError: Cloud Hypervisor refused.
        """
        slots = self._slots.get(request.bus, 0)
        if not 0 <= request.slot < slots:
            raise UsageError(f"Cloud Hypervisor has no slot {request.slot} on a hotplug bus {request.bus!r}")
        total = self._totals[type(request.spec)]
        async with self._lock:
            await self._settle_before_add(total)
            total.require(self._wanted(total) + total.size(request.spec))
            name = self._record.enter(request, total.prefix)
            try:
                await self._ask(total)
            except KataError as err:
                await self._settle_add(name, total, err)
            self._learn(name)
            return AddedDevice(hypervisor_id=name)

    async def remove(self, name: str) -> None:
        """Ask the guest to give a part back; a second request while one is pending is accepted too.

        Raises:
            NotFoundError: there is no such part.
            UnsupportedError: what came stays.
            HypervisorError: Cloud Hypervisor refused.
        """
        async with self._lock:
            if not self.has(name):
                raise NotFoundError(f"Cloud Hypervisor has no {name}")
            device = self._record.devices[name]
            total = self._totals[type(device.spec)]
            if total.kept:
                raise UnsupportedError(f"{name} cannot be removed: {total.kept}")
            if not device.is_leaving:
                await self._ask_to_leave(device, total)
        self._await_removals(total)

    async def present(self) -> list[PresentDevice]:
        """Return the parts that Cloud Hypervisor has, or whose removal the guest has not carried out."""
        await self.reconcile()
        return [
            PresentDevice(hypervisor_id=name, bus=device.bus, slot=device.slot, serial=device.serial, spec=device.spec)
            for name, device in self._own()
        ]

    async def reconcile(self) -> None:
        """Finish what was left half-done, and notice what was given back, while nobody asked."""
        async with self._lock:
            for total in self._totals.values():
                if any(not device.hypervisor_id for _, device in self._own(total)):
                    await self._settle_unanswered(total)
                if self._leaving(total):
                    await self._settle_removals(total)
                    self._await_removals(total)

    async def _settle_before_add(self, total: Total) -> None:
        """Wait, without the lock, until something may be added; the lock is held before and after."""
        clock = asyncio.get_running_loop().time
        end, pause_s = clock() + TIMEOUT_S, _FIRST_PAUSE_S
        while total.is_one_at_a_time and self._leaving(total) and not await self._settle_removals(total):
            if clock() + pause_s > end:
                raise UnavailableError(
                    f"the guest has been asked for {', '.join(self._leaving(total))} and has not given that back",
                    hint="add when it has",
                )
            self._lock.release()
            try:
                await asyncio.sleep(pause_s)
            finally:
                await self._lock.acquire()
            pause_s *= 2

    async def _ask(self, total: Total) -> None:
        """Ask for what the record adds up to; virtio-mem takes being asked for the same twice for an error."""
        wanted = self._wanted(total)
        if total.asked(await self._api.get("vm.info")) != wanted:
            await total.ask(wanted)

    async def _ask_to_leave(self, device: DeviceRecord, total: Total) -> None:
        device.is_leaving = True
        self._save()
        try:
            if len(self._leaving(total)) == 1 or not total.is_one_at_a_time:  # else it is asked for when they are gone
                await self._ask(total)
        except KataError:
            if total.asked(await self._api.get("vm.info")) != self._wanted(total):
                device.is_leaving = False
                self._save()
                raise

    async def _settle_add(self, name: str, total: Total, failure: KataError) -> None:
        """Find out what a failed add did: undo it, or take it for done if only the answer is lost.

        Raises:
            KataError: the failure. The record keeps a part that is there although it was refused: whoever compares
                finds it.
        """
        has_acted = total.asked(await self._api.get("vm.info")) == self._wanted(total)
        if has_acted:
            self._learn(name)
        else:
            self._drop(name)
        if is_refusal(failure) or not has_acted:
            raise failure

    async def _settle_unanswered(self, total: Total) -> None:
        """Find out whether the adds were carried out during which a manager died."""
        has_acted = total.asked(await self._api.get("vm.info")) == self._wanted(total)
        for name, _ in [item for item in self._own(total) if not item[1].hypervisor_id]:
            if has_acted:
                self._learn(name)
            else:
                self._drop(name)

    async def _settle_removals(self, total: Total) -> bool:
        """Tell what is gone of what was asked to leave, and ask for the rest; return whether nothing is awaited."""
        info = await self._api.get("vm.info")
        actual = await total.actual(info)
        if actual is None:
            return False
        for name in self._leaving(total):
            rest = self._sum(total, (device for other, device in self._own(total) if other != name))
            if actual <= rest:
                self._drop(name)
                self._on_removed(name)
        await self._ask(total)
        return not self._leaving(total)

    def _await_removals(self, total: Total) -> None:
        """Have somebody look whether a guest has given back; who does already looks at once and often again."""
        if total in self._awaited:
            self._awaited[total].set()
            return
        self._awaited[total] = asyncio.Event()
        self._workers.spawn(self._follow_removals(total, self._awaited[total]))

    async def _follow_removals(self, total: Total, is_new: asyncio.Event) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._vmm.is_running and not await self._are_removals_done(total):
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await is_new.wait()
            pause_s = _FIRST_PAUSE_S if is_new.is_set() else min(2 * pause_s, _LONGEST_PAUSE_S)
            is_new.clear()
        del self._awaited[total]

    async def _are_removals_done(self, total: Total) -> bool:
        try:
            async with self._lock:
                return await self._settle_removals(total)
        except KataError as err:
            if self._vmm.is_running:
                log.get().warning("it is not known whether a guest has given back", what=total.prefix, error=str(err))
            return False

    def _own(self, total: Total | None = None) -> Iterator[tuple[str, DeviceRecord]]:
        """Yield the parts of the record: of one total, or of all."""
        for name, device in self._record.devices.items():
            if type(device.spec) in self._totals and (total is None or type(device.spec) is total.spec):
                yield name, device

    def _leaving(self, total: Total) -> list[str]:
        return [name for name, device in self._own(total) if device.is_leaving]

    def _wanted(self, total: Total) -> int:
        return self._sum(total, (device for _, device in self._own(total) if not device.is_leaving))

    def _sum(self, total: Total, devices: Iterable[DeviceRecord]) -> int:
        return total.at_boot + sum(total.size(device.spec) for device in devices)

    def _learn(self, name: str) -> None:
        self._record.devices[name].hypervisor_id = name
        self._save()

    def _drop(self, name: str) -> None:
        del self._record.devices[name]
        self._save()

    def _save(self) -> None:
        """Write the record, unless it goes with the directory, whose remover expects no new file."""
        if self._vmm.is_running:
            with suppress(FileNotFoundError):
                self._record.save()
