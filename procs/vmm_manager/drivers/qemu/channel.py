"""The device by which the host reaches the guest: vsock where the host's kernel has it, else virtio-serial.

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
from common.services.channel import KernelVsock, VirtioSerial

if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT_SOCKET = "agent"
VHOST_VSOCK = "/dev/vhost-vsock"

_SLOT = "bus=pcie.0,addr=0x3"
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
"""_IOW(0xAF, 0x60, __u64) of linux/vhost.h."""
_CIDS = range(3, 2**32 - 1)
_DRAWS = 64
"""More than enough: a host has thousands of VMs and not billions."""


@dataclass(frozen=True, slots=True)
class SerialDevice:
    """Ports of a virtio console, with a Unix socket each in QEMU's working directory."""

    fds: tuple[int, ...] = ()
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
    kernel_parameters: str = RESERVED_PARAMETER

    def where(self, _directory: str) -> KernelVsock:
        """Return what callers are told."""
        return KernelVsock(cid=self.cid)

    def arguments(self) -> Iterator[str]:
        """Yield QEMU's arguments."""
        yield from ("-device", f"vhost-vsock-pci,id=vsock,{_SLOT},guest-cid={self.cid},vhostfd={self.fds[0]}")


def choose_device(path: str = VHOST_VSOCK) -> SerialDevice | VsockDevice:
    """Return a vsock device where the host has it, else a virtio-serial one. The caller closes its ``fds``."""
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
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
        else:
            return cid
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def stream_socket(port: int) -> str:
    """Return the name of a stream port's socket in the VM's directory."""
    return f"stream{port}"
