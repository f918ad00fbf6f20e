"""Processors and memory: what was asked for (``vm.resize``), and what the guest has made of it.

Processors come at once and go when the guest ejects them; until then no other total of them is taken. Memory by ACPI
only comes, at most eight times. Memory by virtio-mem is whatever the guest has plugged of what was asked for.

Source of words and order: vmm/src/cpu.rs, vmm/src/memory_manager.rs and virtio-devices/src/mem.rs of v53.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

BUSY = ("Too Many Requests",)
"""What status 429 says."""
_MODULES = 8
_MODULE_STEP = 128 << 20
_BLOCK = 2 << 20


class RefusalError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        reasons: from the outermost to the root cause.
    """

    def __init__(self, status: int, *reasons: str) -> None:
        super().__init__(*reasons)
        self.status = status
        self.reasons = list(reasons)


class Totals:
    """What one VM has of both.

    Args:
        config: of the VM, which is changed as the real one's is.

    Attributes:
        vcpus: that are there.
        plugged: bytes that the guest has plugged by virtio-mem.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._boot_size = int(config["memory"]["size"])
        self._vcpus_left: int | None = None
        self._requested = 0
        self._modules = 0
        self.vcpus = int(config["cpus"]["boot_vcpus"])
        self.plugged = 0

    @property
    def memory(self) -> int:
        """The actual size."""
        return int(self._config["memory"]["size"]) + self.plugged

    def resize(self, body: Mapping[str, int]) -> None:
        """Take new totals."""
        if "desired_vcpus" in body:
            self._resize_vcpus(body["desired_vcpus"])
            self._config["cpus"]["boot_vcpus"] = body["desired_vcpus"]
        if "desired_ram" in body:
            if self._config["memory"].get("hotplug_method") == "VirtioMem":
                self._resize_virtio_mem(body["desired_ram"])
            else:
                self._resize_by_acpi(body["desired_ram"])

    def follow(self) -> None:
        """Have the guest do what it was asked to."""
        self.vcpus, self._vcpus_left = self._vcpus_left or self.vcpus, None
        self.plugged = self._requested

    def _resize_vcpus(self, desired: int) -> None:
        if desired == self.vcpus:
            return
        if desired < 1:
            raise _refusal("Error from CPU manager", "Requested zero vCPUs")
        if self._vcpus_left is not None:
            raise RefusalError(429, *BUSY)
        if desired > self._config["cpus"]["max_vcpus"]:
            raise _refusal("Error from CPU manager", "Requested vCPUs exceed maximum")
        if desired > self.vcpus:
            self.vcpus = desired
        else:
            self._vcpus_left = desired

    def _resize_by_acpi(self, desired: int) -> None:
        memory = self._config["memory"]
        more = desired - memory["size"]
        if more > 0:
            if self._modules == _MODULES:
                raise _refusal("Memory manager error", "No ACPI slot available")
            if more % _MODULE_STEP:
                raise _refusal("Memory manager error", "The requested hotplug memory addition is not a valid size")
            if desired > self._boot_size + (memory.get("hotplug_size") or 0):
                raise _refusal("Memory manager error", "Not enough space in the hotplug RAM region")
            self._modules += 1
        memory["size"] = desired

    def _resize_virtio_mem(self, desired: int) -> None:
        memory, wanted = self._config["memory"], desired - self._boot_size
        why = ""
        if wanted < 0:
            raise _refusal(
                "Memory manager error",
                f"Invalid resize request: desired_size = {desired} below boot size = {self._boot_size}",
            )
        if wanted == self._requested:
            why = f"new size {wanted:#x} and requested_size are identical"
        elif wanted > memory["hotplug_size"]:
            why = f"new size {wanted:#x} is bigger than region_size {memory['hotplug_size']:#x}"
        elif wanted % _BLOCK:
            why = f"new size {wanted:#x} is not aligned on block_size {_BLOCK:#x}"
        if why:
            reasons = ("Failed to virtio-mem resize", f"Failed to update virtio configuration: ResizeError({why})")
            raise _refusal("Memory manager error", *reasons)
        self._requested = wanted
        memory["hotplugged_size"] = wanted or None


def _refusal(*reasons: str) -> RefusalError:
    return RefusalError(500, "Error from API", "The VM could not be resized", *reasons)
