"""What Cloud Hypervisor is started with and asked for. Pure: a configuration in, arguments and JSON out.

Decisions that are visible here:

- *Nothing is left to a default* that differs between versions, or that hurts: an image whose type is not named is
  probed,
  and a raw one's first sector is then not written; the console would be our standard output.
- *Console.* The guest's serial port is Cloud Hypervisor's standard output, a FIFO that never blocks (``output``).
- *Sockets and files* of the VM are named relative to its directory: a Unix socket's path holds 107 bytes (unix(7)).
- *RAM* is shared, since virtiofsd maps the guest's pages. What may come later is in whole blocks of 128 MiB, as guests
  take it, from an address that is such a multiple.
- *No id* is ever sent.

Source: ``vmm/src/vm_config.rs`` and ``cloud-hypervisor/src/main.rs`` of v51.1 and v53.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import guest_cmdline
from procs.vmm_manager.drivers.probe import KERNEL_PARAMETERS

if TYPE_CHECKING:
    from common.config import ClhConfig
    from common.services.vmm import BlockSpec, PmemSpec
    from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement

API_SOCKET = "api"
VSOCK = "vsock"
GUEST_CID = 3
"""Each VM's vsock ends in a socket of its own, so all have the first number that a guest may have."""

_QUEUE_SIZE = 1024
_NIC_QUEUE_SIZE = 256
_MEMORY_BLOCK_MIB = 128
"""``MIN_MEMORY_BLOCK_SIZE`` of Linux; ``VIRTIO_MEM_ALIGN_SIZE`` in virtio-devices/src/mem.rs"""


def argv(config: ClhConfig, *, api_fd: int, events_fd: int) -> list[str]:
    """Return the command line of a VMM without a VM.

    Args:
        config: ``[hypervisor.clh]``.
        api_fd: listening socket of the API, which it inherits: we may connect before it runs.
        events_fd: where it writes events; a descriptor, so that it has a reader whoever runs.
    """
    return [
        config.path,
        *("--api-socket", f"fd={api_fd}"),
        *("--event-monitor", f"fd={events_fd}"),
        *("--seccomp", "false" if config.disable_seccomp else "true"),
        *["-v"] * (3 if config.enable_debug else config.hypervisor_loglevel),
    ]


def probe_argv(config: ClhConfig) -> list[str]:
    """Return the command that boots the guest's kernel for :class:`procs.vmm_manager.drivers.probe.Probe`."""
    return [
        config.path,
        *("--kernel", config.kernel, "--cmdline", KERNEL_PARAMETERS, "--serial", "tty", "--console", "off"),
        *("--memory", "size=256M", "--cpus", "boot=1"),
    ]


def vm_config(config: ClhConfig, confinement: Confinement) -> dict[str, Any]:
    """Return the body of ``vm.create``."""
    extra = f"debug {config.kernel_params}".strip() if config.enable_debug else config.kernel_params
    return {
        "cpus": {"boot_vcpus": config.default_vcpus, "max_vcpus": config.max_vcpus},
        "memory": {"size": config.default_memory << 20, "shared": True, **_growth(config)},
        "payload": {
            "kernel": config.kernel,
            "initramfs": config.initrd,
            "cmdline": guest_cmdline.parameters(extra),
        },
        **({"platform": {"num_pci_segments": config.default_bridges}} if config.default_bridges > 1 else {}),
        "vsock": {"cid": GUEST_CID, "socket": VSOCK},
        **confinement.parameters(),
        "console": {"mode": "Off"},
        "serial": {"mode": "Tty"},
    }


def _growth(config: ClhConfig) -> dict[str, Any]:
    """Return the part of ``vm.create`` about memory that may come later."""
    if not config.may_grow:
        return {}
    method = "VirtioMem" if config.enable_virtio_mem else "Acpi"
    blocks = -(-(config.max_memory - config.default_memory) // _MEMORY_BLOCK_MIB)
    is_aligned = config.default_memory % _MEMORY_BLOCK_MIB == 0
    return {"hotplug_method": method, "hotplug_size": (blocks + (not is_aligned)) * _MEMORY_BLOCK_MIB << 20}


def disk(path: str, spec: BlockSpec, serial: str, config: ClhConfig) -> dict[str, Any]:
    """Return the body of ``vm.add-disk`` for a disk whose file has a path, without its place."""
    return {
        "path": path,
        "readonly": spec.is_read_only,
        "image_type": "Raw",
        "serial": serial,
        "num_queues": config.default_vcpus,
        "queue_size": _QUEUE_SIZE,
        "direct": config.block_device_cache_set and config.block_device_cache_direct,
    }


def share(tag: str, socket: str, config: ClhConfig) -> dict[str, Any]:
    """Return the body of ``vm.add-fs``, without its place."""
    return {"tag": tag, "socket": socket, "num_queues": 1, "queue_size": config.virtio_fs_queue_size}


def vhost_user_disk(socket: str, serial: str) -> dict[str, Any]:
    """Return the body of ``vm.add-disk`` for a disk that a program serves, without its place. It has one queue."""
    return {"vhost_user": True, "vhost_socket": socket, "serial": serial, "num_queues": 1, "queue_size": _QUEUE_SIZE}


def pmem(path: str, spec: PmemSpec) -> dict[str, Any]:
    """Return the body of ``vm.add-pmem`` for a file with a path, without its place."""
    return {"file": path, "discard_writes": spec.is_read_only}


def host_device(address: str) -> dict[str, Any]:
    """Return the body of ``vm.add-device``, without its place."""
    return {"path": f"/sys/bus/pci/devices/{address}"}


def nic(mac: str) -> dict[str, Any]:
    """Return the body of ``vm.add-net`` for an interface whose descriptor goes beside it, without its place."""
    return {"mac": mac, "num_queues": 2, "queue_size": _NIC_QUEUE_SIZE}
