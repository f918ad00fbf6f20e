"""The device by which the host reaches the guest, as configuration and host have it.

Hybrid vsock if the configuration names a daemon for it (``vsock_daemon``), else vsock of the host's kernel where that
has it, else virtio-serial (docs/adr/0034-a-daemon-for-vsock.md).

*Addresses.* A guest's vsock address (CID) belongs to one VM of the host. We draw one at random, as upstream does, and
have the kernel keep it for us on a descriptor of /dev/vhost-vsock, which QEMU then inherits. The kernel refuses one
that another VM has, and frees it when the last holder of the descriptor ends (drivers/vhost/vsock.c). Addresses below 3
mean the hypervisor, the local machine and the host, and 2**32-1 means any (linux/vm_sockets.h).

*Who may connect.* Every user of the host can connect to a vsock address. So the guest is told to listen only to ports
below 1024, which only root can bind (:mod:`common.channel`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import log
from common.channel import AGENT_PORT, RESERVED_PARAMETER, STREAM_PORT, STREAM_PORTS
from common.services.channel import HybridVsock, KernelVsock, VirtioSerial
from procs.vmm_manager.drivers.qemu import vsock_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config import QemuConfig
    from procs.vmm_manager.drivers.spawn import Process

AGENT_SOCKET = "agent"
VHOST_VSOCK = "/dev/vhost-vsock"

_SLOT = "bus=pcie.0,addr=0x3"
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
"""_IOW(0xAF, 0x60, __u64) of linux/vhost.h."""
_CIDS = range(3, 2**32 - 1)
_DRAWS = 64
"""More than enough: a host has thousands of VMs and not billions."""


@dataclass(frozen=True, slots=True)
class SerialDevice:
    """Ports of a virtio console, with a Unix socket each in QEMU's working directory."""

    fds: tuple[int, ...] = ()
    daemon: Process | None = None
    kernel_parameters: str = ""

    def where(self, directory: str) -> VirtioSerial:
        """Return what callers are told."""
        return VirtioSerial(
            agent_socket=f"{directory}/{AGENT_SOCKET}",
            stream_sockets=tuple(f"{directory}/{stream_socket(port)}" for port in range(STREAM_PORTS)),
        )

    def arguments(self) -> Iterator[str]:
        """Yield QEMU's arguments."""
        yield from ("-device", f"virtio-serial-pci,id=serial,{_SLOT},max_ports=31")
        ports = [(AGENT_SOCKET, AGENT_PORT), *((stream_socket(n), f"{STREAM_PORT}{n}") for n in range(STREAM_PORTS))]
        for number, (socket, name) in enumerate(ports, start=1):
            yield from ("-chardev", f"socket,id={socket},path={socket},server=on,wait=off")
            yield from ("-device", f"virtserialport,bus=serial.0,nr={number},chardev={socket},name={name}")


@dataclass(frozen=True, slots=True)
class VsockDevice:
    """A vsock device of the host's kernel. We hold its descriptor until QEMU has inherited it.

    Attributes:
        cid: the guest's address.
        fds: the descriptor that holds it.
    """

    cid: int
    fds: tuple[int]
    daemon: Process | None = None
    kernel_parameters: str = RESERVED_PARAMETER

    def where(self, _directory: str) -> KernelVsock:
        """Return what callers are told."""
        return KernelVsock(cid=self.cid)

    def arguments(self) -> Iterator[str]:
        """Yield QEMU's arguments."""
        yield from ("-device", f"vhost-vsock-pci,id=vsock,{_SLOT},guest-cid={self.cid},vhostfd={self.fds[0]}")


@dataclass(frozen=True, slots=True)
class DaemonDevice:
    """A vsock device that a daemon serves. We hold the connection to it until QEMU has inherited it.

    Attributes:
        fds: the connection, on which QEMU speaks vhost-user.
        daemon: its process.
    """

    fds: tuple[int]
    daemon: Process | None
    kernel_parameters: str = ""

    def where(self, directory: str) -> HybridVsock:
        """Return what callers are told."""
        return HybridVsock(socket=f"{directory}/{vsock_daemon.SOCKET}", is_late=True)

    def arguments(self) -> Iterator[str]:
        """Yield QEMU's arguments."""
        yield from ("-chardev", f"socket,id=vsock,fd={self.fds[0]}")
        yield from ("-device", f"vhost-user-vsock-pci,id={vsock_daemon.DEVICE_ID},{_SLOT},chardev=vsock")


Device = SerialDevice | VsockDevice | DaemonDevice


async def make_device(config: QemuConfig, *, directory: str, cgroup: str) -> Device:
    """Return the device of a VM that is about to be started. The caller closes its ``fds`` and ends its ``daemon``.

    Raises:
        HypervisorError: the configured daemon does not do its work.
    """
    path = config.vhost_user_vsock_daemon
    if not path:
        return choose_device()
    daemon, connection = await vsock_daemon.start(path, directory=directory, cgroup=cgroup)
    log.get().info("channel of the VM", device="vhost-user-vsock", daemon=path)
    return DaemonDevice((connection.detach(),), daemon)


def choose_device(path: str = VHOST_VSOCK) -> SerialDevice | VsockDevice:
    """Return a device that needs no daemon: vsock where the host's kernel has it, else virtio-serial."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        log.get().info("channel of the VM", device="virtio-serial", reason=f"{path}: {err.strerror}")
        return SerialDevice()
    try:
        cid = _claim(fd)
    except OSError as err:
        os.close(fd)
        log.get().warning(
            "channel of the VM", device="virtio-serial", reason=f"{path} gives no address: {err.strerror}"
        )
        return SerialDevice()
    log.get().info("channel of the VM", device="vsock", cid=cid)
    return VsockDevice(cid, (fd,))


def _claim(fd: int) -> int:
    """Draw addresses until the kernel accepts one.

    Raises:
        OSError: it accepts none.
    """
    for _ in range(_DRAWS):
        cid = secrets.choice(_CIDS)
        try:
            fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
        else:
            return cid
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def stream_socket(port: int) -> str:
    """Return the name of a stream port's socket in the VM's directory."""
    return f"stream{port}"
