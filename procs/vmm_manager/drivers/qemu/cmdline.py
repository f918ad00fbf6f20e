"""QEMU's command line. Pure: a description in, arguments out.

Decisions that are visible here:

- *Console.* The guest may print for ever, so its serial port ends in a ring buffer inside QEMU and not in a file. A
  guest that panics or resets leaves QEMU paused (``-action``), so that the buffer can still be read; then the manager
  ends QEMU.
- *Sockets* are named relative to QEMU's working directory, the VM's own: a sandbox id may have 76 characters and a
  Unix socket's path 107 bytes (unix(7)).
- *Hotplug buses* are at fixed addresses, so that the guest's path of a device is known (``topology``).
- *RAM* is a shared memfd, since virtiofsd maps the guest's pages.
- *Escaping.* ``-kernel``, ``-initrd`` and ``-append`` take a string as it is; only ``-name`` puts a foreign value into
  an option list. ``-sandbox`` takes the configuration's value, which is itself such a list.
- *enable_debug* has the guest's kernel print everything, and QEMU what it thinks of the guest. A monitor serves one
  client at a time and ours is taken: ``extra_monitor_socket`` gives people one of their own.

Sources: qemu(1); QEMU's docs/interop/vhost-user.rst for the memory; tests on 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from common import guest_cmdline
from procs.vmm_manager.drivers.probe import KERNEL_PARAMETERS
from procs.vmm_manager.drivers.qemu.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config import QemuConfig
    from procs.vmm_manager.drivers.qemu.channel import Device

QMP_SOCKET = "qmp"
EXTRA_MONITOR_SOCKET = "extra-monitor.sock"
CONSOLE = "console"
CONSOLE_SIZE = 64 << 10
"""Bytes of console that are kept; QEMU wants a power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuCommand:
    """What distinguishes one QEMU from another.

    Attributes:
        sandbox_id: shown as the VM's name.
        config: ``[hypervisor.qemu]``.
        accelerator: ``kvm`` or ``tcg``.
        qmp_fd: listening socket that QEMU inherits; we may connect before it runs.
        channel: the device by which the host reaches the guest.
        is_held: whether it waits with the boot until it is told to go on.
    """

    sandbox_id: str
    config: QemuConfig
    accelerator: str
    qmp_fd: int
    channel: Device
    is_held: bool = False

    def argv(self) -> list[str]:
        """Return the arguments, program first."""
        parts = (self._machine(), self._boot(), self._console(), self._monitor(), self.channel.arguments())
        return [self.config.path, *chain.from_iterable(parts), *Topology(self.config).arguments()]

    def _machine(self) -> Iterator[str]:
        config = self.config
        yield from ("-name", f"{escaped(self.sandbox_id)},debug-threads=on")
        yield from ("-machine", f"{config.machine_type},accel={self.accelerator},memory-backend=ram,vmport=off")
        yield from ("-object", f"memory-backend-memfd,id=ram,size={config.default_memory}M,share=on")
        yield from ("-m", memory(config), "-smp", processors(config))
        yield from ("-cpu", guest_cmdline.QEMU_CPU[self.accelerator])
        yield from ("-nodefaults", "-no-user-config", "-display", "none")
        yield from ("-action", "reboot=shutdown,shutdown=pause,panic=pause")
        if self.is_held:
            yield "-S"
        if config.seccompsandbox:
            yield from ("-sandbox", config.seccompsandbox)
        if config.enable_debug:
            yield from ("-d", "guest_errors,unimp")

    def _boot(self) -> Iterator[str]:
        yield from ("-kernel", self.config.kernel, "-initrd", self.config.initrd)
        debug = "debug" if self.config.enable_debug else ""
        extra = " ".join(filter(None, (self.channel.kernel_parameters, debug, self.config.kernel_params)))
        yield from ("-append", guest_cmdline.parameters(extra))

    def _console(self) -> Iterator[str]:
        yield from ("-chardev", f"ringbuf,id={CONSOLE},size={CONSOLE_SIZE}", "-serial", f"chardev:{CONSOLE}")

    def _monitor(self) -> Iterator[str]:
        yield from (
            "-chardev",
            f"socket,id=qmp,fd={self.qmp_fd},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        )
        if self.config.enable_debug and self.config.extra_monitor_socket:
            option = f"-{self.config.extra_monitor_socket}".replace("-hmp", "-monitor")
            yield from (option, f"unix:{EXTRA_MONITOR_SOCKET},server=on,wait=off")


def probe_argv(config: QemuConfig) -> list[str]:
    """Return the command that boots the guest's kernel for :class:`procs.vmm_manager.drivers.probe.Probe`."""
    return [
        config.path,
        *("-machine", f"{config.machine_type},accel=kvm", "-cpu", guest_cmdline.QEMU_CPU["kvm"], "-m", "256M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", config.kernel, "-append", KERNEL_PARAMETERS),
    ]


def processors(config: QemuConfig) -> str:
    """Return how many processors a VM boots with, and how many it may have later."""
    boot = str(config.default_vcpus)
    return f"{boot},maxcpus={config.max_vcpus}" if config.max_vcpus > config.default_vcpus else boot


def memory(config: QemuConfig) -> str:
    """Return how much memory a VM boots with, and how much it may have later."""
    boot = f"{config.default_memory}M"
    return f"{boot},slots={config.memory_slots},maxmem={config.max_memory}M" if config.may_grow else boot


def escaped(value: str) -> str:
    """Return a value as it may stand in an option list: QEMU ends a value at a comma and reads two as one."""
    return value.replace(",", ",,")
