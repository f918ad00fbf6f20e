"""Processors and memory of a VM that came after its boot.

A processor stands on nothing: QEMU has a list of all that the machine can ever have, and a device is one of them. Under
emulation one that has come stays: QEMU 7.2 was seen to end at one of three removals, and has no second place for the
translated code of one that comes back (``tcg_register_thread`` in tcg/tcg.c). A memory module (pc-dimm) stands on a
memory backend, shared like the boot's since virtiofsd maps it.

The guest is told by ACPI and decides itself when it takes a part into use, and whether it gives one back: one that does
not says so (``DEVICE_UNPLUG_GUEST_ERROR``), and keeps it.

Sources: qapi/machine.json (``query-hotpluggable-cpus``), qapi/qom.json (``object-add``), docs/memory-hotplug.txt of
QEMU 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.errors import HypervisorError
from common.services.vmm import MemorySpec
from procs.vmm_manager.drivers.qemu import objects
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from common.config import QemuConfig
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord


class Cpus(Backend):
    """Processors; slot n of their bus is the n-th that the machine did not boot with."""

    prefix = "cpu-"

    def __init__(self, config: QemuConfig, accelerator: str, qmp: Qmp) -> None:
        self.kept = "under emulation QEMU may end when a processor goes" if accelerator == "tcg" else ""
        self._config = config
        self._qmp = qmp

    async def make(self, _device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Find the processor that belongs to the slot.

        Raises:
            HypervisorError: QEMU does not have so many.
        """
        possible: list[dict[str, Any]] = await self._qmp.execute("query-hotpluggable-cpus")
        possible.sort(key=lambda cpu: sorted(cpu["props"].items()))
        number = self._config.default_vcpus + device.slot
        if number >= len(possible):
            raise HypervisorError(f"QEMU can have {len(possible)} processors and not a {number + 1}th")
        return {"driver": possible[number]["type"], **possible[number]["props"]}

    async def unmake(self, _device_id: str) -> None:
        """Nothing: it stands on nothing."""

    async def made(self) -> set[str]:
        """Return nothing."""
        return set()


class Memory(Backend):
    """Memory modules; the id of a device is also its backend's."""

    prefix = "memory-"

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Have QEMU get the memory.

        Raises:
            HypervisorError: QEMU refused.
        """
        spec = device.spec
        assert isinstance(spec, MemorySpec)
        await objects.add(self._qmp, "memory-backend-memfd", device_id, size=spec.size_mib << 20, share=True)
        return {"driver": "pc-dimm", "memdev": device_id}

    async def unmake(self, device_id: str) -> None:
        """Have QEMU give the memory back."""
        if device_id in await self.made():
            await objects.remove(self._qmp, device_id)

    async def made(self) -> set[str]:
        """Return the backends that QEMU has."""
        return await objects.listed(self._qmp, self.prefix)
