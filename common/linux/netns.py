"""Network interfaces that a VM is connected to, opened in the network namespace that they are in.

A thread of our own enters the namespace (setns(2) is a matter of the thread), opens the interface and ends; what it has
opened stays with the process. Whoever has the descriptor has the interface, whatever namespace it is in itself.

A *tap* is made by opening it, if it is not there, and goes with its last descriptor unless somebody has made it to stay
(Documentation/networking/tuntap.rst). A *macvtap* has to be there. It has a character device, whose number only the
namespace's own sysfs tells; so the thread takes a mount namespace too, mounts that sysfs there, makes the node in a
tmpfs that nobody else sees, and opens it (drivers/net/macvtap.c).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import stat
import struct
import threading
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.linux import mounts

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# <linux/sched.h>
_CLONE_NEWNS = 0x0002_0000
_CLONE_NEWNET = 0x4000_0000

# <linux/nsfs.h>
_NS_GET_NSTYPE = 0xB703

# <linux/if_tun.h>
_TUNSETIFF = 0x4004_54CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")

_NAME = re.compile(r"[^/\s\x00:%]{1,15}")
_SYSFS = "/sys"
_NODES = "/tmp"  # noqa: S108 - in a mount namespace of the thread's own


def is_interface_name(name: str) -> bool:
    """Return whether the kernel takes a name as it is (``dev_valid_name`` and, for ``%``, ``__dev_alloc_name``)."""
    return bool(_NAME.fullmatch(name)) and name not in {".", ".."}


def is_network_namespace(path: str) -> bool:
    """Return whether a path leads to a network namespace; its kind is asked of the kernel (ioctl_ns(2)).

    Raises:
        OSError: there is nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError as err:
        if err.errno == errno.ENOTTY:
            return False
        raise
    finally:
        os.close(fd)


def open_tap(namespace: str, name: str) -> int:
    """Open a tap interface, and make it if it is not there; return its descriptor.

    Args:
        namespace: path of the network namespace.
        name: of the interface.

    Raises:
        OSError: there is no such namespace; the interface is no tap, or in use (EBUSY).
    """
    return within(namespace, lambda: attached("/dev/net/tun", name))


def open_macvtap(namespace: str, name: str) -> int:
    """Open a macvtap interface; return its descriptor.

    Args:
        namespace: path of the network namespace.
        name: of the interface.

    Raises:
        OSError: there is no such namespace or interface; it is no macvtap, or in use (EBUSY).
    """

    def opened() -> int:
        index = socket.if_nametoindex(name)
        _unshare(_CLONE_NEWNS)
        mounts.set_propagation("/", mounts.MS_PRIVATE | mounts.MS_REC)
        mounts.mount("sysfs", _SYSFS, "sysfs", mounts.MS_RDONLY)
        try:
            number = Path(f"{_SYSFS}/class/net/{name}/tap{index}/dev").read_text().split(":")
        except FileNotFoundError as err:
            raise OSError(errno.EINVAL, f"{name} is no macvtap") from err
        mounts.mount("tmpfs", _NODES, "tmpfs")
        node = f"{_NODES}/tap"
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(int(number[0]), int(number[1])))
        return attached(node, name)

    return within(namespace, opened)


def attached(node: str, name: str) -> int:
    """Open a character device and attach it to an interface, for packets with virtio's header before them.

    Raises:
        OSError: it cannot be attached.
    """
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except BaseException:
        os.close(fd)
        raise
    return fd


def within(namespace: str, work: Callable[[], T]) -> T:
    """Do something in a network namespace, in a thread that is not used for anything else.

    Raises:
        OSError: there is no such namespace, or the work fails.
    """
    outcome: list[T] = []
    failure: list[OSError] = []

    def run() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _checked(_libc().setns(fd, _CLONE_NEWNET), namespace)
            finally:
                os.close(fd)
            outcome.append(work())
        except OSError as err:
            failure.append(err)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _unshare(flags: int) -> None:
    _checked(_libc().unshare(flags), "unshare")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
