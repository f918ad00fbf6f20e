"""Makes a system of the bare kernel: mounts, a root that containers can leave, the loopback interface."""

from __future__ import annotations

import _socket
import fcntl
import posix
import struct

from guest.agent import kernel
from guest.agent.files import make_directories, read_text

_CONSOLE = "/dev/console"
_NEW_ROOT = "/run/root"

_VIRTIO_DEVICES = "/sys/bus/virtio/devices"
_PLATFORM_DEVICES = "/sys/bus/platform/devices"
_VIRTIO_MMIO = "LNRO0005"
"""The ACPI name of a virtio device without a bus (drivers/virtio/virtio_mmio.c)."""
VIRTIO_VSOCK, VIRTIO_MEM = 19, 24
"""Device ids of a virtio socket and of a memory device (virtio 1.2, section 5)."""

_RESTRICTED = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sH14x")  # struct ifreq (netdevice(7)): name and flags


def mount_basics() -> None:
    """Mount what the agent itself needs: processes, devices, device nodes."""
    kernel.mount("proc", "/proc", "proc", _RESTRICTED)
    kernel.mount("sysfs", "/sys", "sysfs", _RESTRICTED)
    kernel.mount("dev", "/dev", "devtmpfs", kernel.MS_NOSUID)


def open_console() -> bool:
    """Make the console our standard streams, or nothing if there is no console; return which of them it is.

    A console of virtio is there once its module is loaded.
    """
    try:
        console = posix.open(_CONSOLE, posix.O_RDWR | posix.O_NOCTTY)
    except OSError:
        _become_streams(posix.open("/dev/null", posix.O_RDWR))
        return False
    _become_streams(console)
    return True


def _become_streams(opened: int) -> None:
    for descriptor in (0, 1, 2):
        posix.dup2(opened, descriptor)
    if opened > 2:
        posix.close(opened)


def prepare_for_containers() -> None:
    """Set up what containers need of the guest."""
    _leave_initramfs()
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    kernel.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", _RESTRICTED)
    _bring_up_loopback()


def is_without_pci() -> bool:
    """Return whether the VM's devices are on no bus, but at addresses that ACPI tells (virtio 1.2, 4.2)."""
    return any(name.startswith(_VIRTIO_MMIO) for name in posix.listdir(_PLATFORM_DEVICES))


def has_virtio_device(kind: int) -> bool:
    """Return whether the VM has a device of this id; the drivers of virtio's buses must be loaded."""
    devices = posix.listdir(_VIRTIO_DEVICES)
    return any(read_text(f"{_VIRTIO_DEVICES}/{name}/device").strip() == f"{kind:#06x}" for name in devices)


def _leave_initramfs() -> None:
    """Make the root a mount.

    pivot_root(2), which the runtime uses, refuses to leave the kernel's first root file system, since nothing is
    below it. So the whole tree is bound to a directory, which then becomes the root.
    """
    make_directories(_NEW_ROOT)
    kernel.mount("/", _NEW_ROOT, "", kernel.MS_BIND | kernel.MS_REC)
    posix.chdir(_NEW_ROOT)
    kernel.mount(_NEW_ROOT, "/", "", kernel.MS_MOVE)
    posix.chroot(".")
    posix.chdir("/")


def _bring_up_loopback() -> None:
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    name, flags = _IFREQ.unpack(fcntl.ioctl(control.fileno(), _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
    fcntl.ioctl(control.fileno(), _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))
    control.close()
