"""How a VM is configured before it starts, a configuration in and requests out, and its start.

Paths are relative to Firecracker's working directory, which is the jail's root: the same with a jailer and without.

Devices get their places in the order in which Firecracker attaches them, whatever the order of the requests: drives,
vsock, entropy (``build_microvm_for_boot`` in src/vmm/src/builder.rs). With PCI the host bridge is in slot 0.

The guest's console is Firecracker's standard output. A guest that panics or resets ends Firecracker: ``reboot=k`` has
the kernel reset by the keyboard controller, which is all that Firecracker has of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from common import guest_cmdline
from common.config import BlockDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config import FirecrackerConfig
    from procs.vmm_manager.drivers.firecracker.api import Api

KERNEL, INITRD = "kernel", "initrd"
PLACEHOLDER = "placeholder"
"""What a drive is on that holds no disk: one sector, which no disk of ours has."""
VSOCK = "vsock"
GUEST_CID = 3
"""The first that a guest can have (vsock(7)); Firecracker does not look at it."""

_RESET = "reboot=k"
_TIMEOUT_S = 30.0
"""How long Firecracker may read kernel and initrd, on a host that is loaded beyond reason."""


class Request(NamedTuple):
    """A PUT of the API."""

    path: str
    body: dict[str, object]


def is_on_pci(config: FirecrackerConfig) -> bool:
    """Return whether the VM has a PCI bus, on which disks are plugged."""
    return config.block_device_driver is BlockDriver.VIRTIO_BLK


def requests(config: FirecrackerConfig) -> Iterator[Request]:
    """Yield what configures a VM; then it is started."""
    yield Request("/machine-config", {"vcpu_count": config.default_vcpus, "mem_size_mib": config.default_memory})
    extra = f"{_RESET} debug {config.kernel_params}" if config.enable_debug else f"{_RESET} {config.kernel_params}"
    arguments = guest_cmdline.parameters(extra.strip())
    yield Request("/boot-source", {"kernel_image_path": KERNEL, "initrd_path": INITRD, "boot_args": arguments})
    yield Request("/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK})
    yield Request("/entropy", {})
    for number, is_read_only in enumerate(placeholders(config)):
        yield Request(f"/drives/{drive(number)}", drive_body(drive(number), PLACEHOLDER, is_read_only=is_read_only))


async def start(api: Api) -> None:
    """Have a VM that is configured boot.

    Raises:
        KataError: Firecracker refused, or did not answer.
    """
    await api.put("/actions", {"action_type": "InstanceStart"}, timeout_s=_TIMEOUT_S)


def placeholders(config: FirecrackerConfig) -> list[bool]:
    """Return the drives that a VM is started with: for each, whether it can only be read."""
    if is_on_pci(config):
        return []
    return [False] * config.placeholder_drives + [True] * config.read_only_placeholder_drives


def drive(number: int) -> str:
    """Return the id of a placeholder's drive; ids have letters, digits and underscores only."""
    return f"drive_{number}"


def drive_body(drive_id: str, path: str, *, is_read_only: bool) -> dict[str, object]:
    """Return what describes a drive. ``Writeback`` has the guest's flushes reach the disk; the default does not."""
    return {
        "drive_id": drive_id,
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": is_read_only,
        "cache_type": "Writeback",
    }
