"""Taps for a process that opens its interfaces by name, in a network namespace where there is nothing else.

Who opens a tap by name has to find it there, and so it is made first, to stay without anybody who has it open. Once
that process has it open, it is to stay no longer: what says so is a copy of the process's own descriptor. Then it is
moved to where it is wanted, and goes with that descriptor, whoever lives then.

::

    make            a tap that stays, of one user                      in the process's namespace
    (the process opens it)
    let_go_with     it ends with the process's descriptor
    move            under its own name                                 in the namespace that it is for

Sources: Documentation/networking/tuntap.rst and drivers/net/tun.c of Linux; pidfd_getfd(2); rtnetlink(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING

from common.linux.netns import attached, within

if TYPE_CHECKING:
    from collections.abc import Iterator

_TUN = "/dev/net/tun"
# <linux/if_tun.h>
_TUNSETPERSIST = 0x4004_54CB
_TUNSETOWNER = 0x4004_54CC

_SYS_PIDFD_GETFD = 438
"""The same on every architecture (Linux 5.6)."""

# <linux/rtnetlink.h>, <linux/if_link.h>, <linux/netlink.h>
_RTM_NEWLINK = 16
_NLM_F_REQUEST_ACK = 0x01 | 0x04
_IFLA_IFNAME = 3
_IFLA_NET_NS_FD = 28
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")


def make(namespace: str, name: str, owner: int) -> None:
    """Make a tap that one user may open, and that stays.

    Args:
        namespace: path of the network namespace.
        name: of the interface.
        owner: that user.

    Raises:
        OSError: there is no such namespace, or the name is taken (EBUSY if somebody has it open).
    """

    def work() -> None:
        with _opened(name) as fd:
            ioctl(fd, _TUNSETOWNER, owner)
            ioctl(fd, _TUNSETPERSIST, 1)

    within(namespace, work)


def remove(namespace: str, name: str) -> None:
    """Remove a tap that stays and that nobody has open; one that is not there, or that somebody has, is left alone.

    Raises:
        OSError: there is no such namespace.
    """

    def work() -> None:
        if name not in _names():
            return
        try:
            with _opened(name) as fd:
                ioctl(fd, _TUNSETPERSIST, 0)
        except OSError as err:
            if err.errno != errno.EBUSY:
                raise

    within(namespace, work)


def exists(namespace: str, name: str) -> bool:
    """Return whether a namespace has an interface of this name.

    Raises:
        OSError: there is no such namespace.
    """
    return within(namespace, lambda: name in _names())


def let_go_with(pid: int, name: str) -> None:
    """Have a tap that a process has open go when that is closed.

    Raises:
        OSError: the process has ended, or has no such tap open.
    """
    with _copy_of(pid, name) as fd:
        ioctl(fd, _TUNSETPERSIST, 0)


def move(namespace: str, name: str, target: str, new_name: str) -> None:
    """Move an interface to another network namespace, where it has another name.

    Raises:
        OSError: there is no such namespace or interface, or there is one of that name already (EEXIST).
    """

    def work() -> None:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            attributes = _attribute(_IFLA_IFNAME, new_name.encode() + b"\0")
            attributes += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", fd))
            _change_link(socket.if_nametoindex(name), attributes)
        finally:
            os.close(fd)

    within(namespace, work)


def _names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@contextmanager
def _opened(name: str) -> Iterator[int]:
    """A tap of the calling thread's network namespace; made, if it is not there."""
    fd = attached(_TUN, name)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _copy_of(pid: int, name: str) -> Iterator[int]:
    """A copy of the descriptor by which a process has a tap open (``tun_chr_show_fdinfo``)."""
    process = os.pidfd_open(pid)
    try:
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            if f"iff:\t{name}\n" in info.read_text():
                fd = _get_descriptor(process, int(info.name))
                break
        else:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
    finally:
        os.close(process)
    try:
        yield fd
    finally:
        os.close(fd)


def _get_descriptor(process: int, number: int) -> int:
    copy = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, process, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(copy)


def _change_link(index: int, attributes: bytes) -> None:
    """Change an interface of the calling thread's network namespace."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _RTM_NEWLINK, _NLM_F_REQUEST_ACK, 1, 0) + body)
        (code,) = _ERROR.unpack_from(kernel.recv(4096), _HEADER.size)
    if code:
        raise OSError(-code, os.strerror(-code))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
