"""A vhost-user back end, as much as a test's device needs: the other end of QEMU's ``vhost-user-*`` devices.

QEMU connects, hands over the guest's memory and two eventfds a ring, and from then on the device works on the rings by
itself (QEMU's docs/interop/vhost-user.rst; virtio 1.2, 2.7 for split rings). One device, one connection.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("<III")
_REPLY = 0x1 | 0x4
_VERSION_1, _PROTOCOL_FEATURES, _CONFIG = 1 << 32, 1 << 30, 1 << 9
_REGION = struct.Struct("<QQQQ")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE = 1, 2


class Memory:
    """The guest's memory, by its own addresses and by QEMU's."""

    def __init__(self, payload: bytes, fds: list[int]) -> None:
        (count,) = struct.unpack_from("<I", payload)
        self._regions = []
        for number, fd in zip(range(count), fds, strict=True):
            guest, size, user, offset = _REGION.unpack_from(payload, 8 + number * _REGION.size)
            self._regions.append((guest, user, size, memoryview(mmap.mmap(fd, size, offset=offset))))
            os.close(fd)

    def at(self, address: int, size: int, *, is_user: bool = False) -> memoryview:
        """Return a piece of it, at an address of the guest's or of QEMU's."""
        for guest, user, length, view in self._regions:
            begin = address - (user if is_user else guest)
            if begin >= 0 and begin + size <= length:
                return view[begin : begin + size]
        raise ValueError(f"no memory at {address:#x}")


@dataclass(slots=True)
class Buffer:
    """A chain of descriptors that the guest has made available."""

    head: int
    readable: bytes = b""
    writable: list[memoryview] = field(default_factory=list)


@dataclass(slots=True)
class Ring:
    """A split ring. ``kick`` becomes readable when the guest has made buffers available."""

    size: int = 0
    addresses: tuple[int, int, int] = (0, 0, 0)
    next: int = 0
    kick: int = -1
    call: int = -1

    @property
    def is_ready(self) -> bool:
        """Whether the guest's driver uses it."""
        return self.kick >= 0 and self.size > 0

    def take(self, memory: Memory) -> Buffer | None:
        """Take the next buffer that the guest has made available."""
        available = memory.at(self.addresses[2], 4 + 2 * self.size, is_user=True)
        (index,) = struct.unpack_from("<H", available, 2)
        if index == self.next & 0xFFFF:
            return None
        (head,) = struct.unpack_from("<H", available, 4 + 2 * (self.next % self.size))
        self.next += 1
        found = Buffer(head)
        for address, length, flags in self._chain(memory, head):
            part = memory.at(address, length)
            if flags & _WRITE:
                found.writable.append(part)
            else:
                found.readable += part
        return found

    def give_back(self, memory: Memory, buffer: Buffer, data: bytes = b"") -> None:
        """Fill a buffer and hand it to the guest."""
        left = data
        for part in buffer.writable:
            part[: min(len(part), len(left))] = left[: len(part)]
            left = left[len(part) :]
        used = memory.at(self.addresses[1], 4 + 8 * self.size, is_user=True)
        (index,) = struct.unpack_from("<H", used, 2)
        struct.pack_into("<II", used, 4 + 8 * (index % self.size), buffer.head, len(data))
        struct.pack_into("<H", used, 2, (index + 1) & 0xFFFF)
        os.eventfd_write(self.call, 1)

    def _chain(self, memory: Memory, head: int) -> Iterator[tuple[int, int, int]]:
        table = memory.at(self.addresses[0], _DESCRIPTOR.size * self.size, is_user=True)
        flags, index = _NEXT, head
        while flags & _NEXT:
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, _DESCRIPTOR.size * index)
            yield address, length, flags
            index = following


class BackEnd:
    """Answers QEMU's messages.

    Attributes:
        memory: the guest's, once QEMU has shown it.
        rings: the device's.
    """

    def __init__(self, connection: socket.socket, rings: int, config: bytes) -> None:
        self.memory: Memory | None = None
        self.rings = [Ring() for _ in range(rings)]
        self._connection = connection
        self._config = config

    def handle(self) -> bool:
        """Handle one message; return whether QEMU is still there."""
        header, fds, _, _ = socket.recv_fds(self._connection, _HEADER.size, 8)
        if len(header) < _HEADER.size:
            return False
        request, _flags, size = _HEADER.unpack(header)
        payload = self._connection.recv(size, socket.MSG_WAITALL) if size else b""
        answer = self._answer(request, payload, fds)
        if answer is not None:
            self._connection.sendall(_HEADER.pack(request, _REPLY, len(answer)) + answer)
        return True

    def _answer(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        match request:
            case 1:  # GET_FEATURES
                return struct.pack("<Q", _VERSION_1 | _PROTOCOL_FEATURES)
            case 15:  # GET_PROTOCOL_FEATURES
                return struct.pack("<Q", _CONFIG)
            case 24:  # GET_CONFIG
                return payload[:12] + self._config.ljust(len(payload) - 12, b"\0")
            case 5:  # SET_MEM_TABLE
                self.memory = Memory(payload, fds)
                return None
            case _:
                return self._set_ring(request, payload, fds)

    def _set_ring(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request not in range(8, 14):  # SET_VRING_NUM to SET_VRING_CALL
            return None
        index, value = _STATE.unpack_from(payload)
        ring = self.rings[index & 0xFF]
        match request:
            case 8:  # SET_VRING_NUM
                ring.size = value
            case 9:  # SET_VRING_ADDR
                _, _, descriptors, used, available, _ = _ADDRESSES.unpack(payload)
                ring.addresses = descriptors, used, available
            case 10:  # SET_VRING_BASE
                ring.next = value
            case 11:  # GET_VRING_BASE, which also stops the ring
                ring.kick = -1
                return _STATE.pack(index, ring.next & 0xFFFF)
            case 12:  # SET_VRING_KICK
                ring.kick = fds[0]
            case _:  # SET_VRING_CALL
                ring.call = fds[0]
        return None
