"""A vsock device with a hybrid socket, for a QEMU in a test: what Cloud Hypervisor and Firecracker have built in.

It gives a real guest a real virtio socket device (virtio 1.2, 5.10) where the host's kernel has no vhost-vsock. Plain
and slow; a thread of the test runs it, or a process of its own (``vsock_daemon``).
"""

from __future__ import annotations

import functools
import os
import selectors
import socket
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Self

from common.testing.vhost_user import BackEnd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GUEST_CID = 3
_HOST_CID = 2
_PACKET = struct.Struct("<QQIIIHHIII")
_STREAM = 1
_REQUEST, _RESPONSE, _RST, _SHUTDOWN, _RW, _CREDIT_UPDATE, _CREDIT_REQUEST = range(1, 8)
_BOTH_WAYS = 3
_ROOM = 256 << 10
"""Bytes that a connection buffers for a client of the host (``buf_alloc``)."""
_CHUNK = 3500
"""Less than a buffer of the guest's driver, which is a page that also holds what the kernel adds."""
_MAX_QUEUED = 32


class _Connection:
    """A client of the host and its peer in the guest; ``events`` is what is watched for."""

    def __init__(self, client: socket.socket, host_port: int) -> None:
        self.client = client
        self.host_port = host_port
        self.guest_port = 0
        self.events = 0
        self.line = b""
        self.is_open = self.is_client_gone = self.is_guest_gone = False
        self.unwritten = bytearray()
        self.forwarded = 0
        self.sent = 0
        self.peer_room = 0
        self.peer_forwarded = 0

    @property
    def credit(self) -> int:
        """How many bytes the guest still takes."""
        return self.peer_room - (self.sent - self.peer_forwarded) % (1 << 32)

    def wanted(self, *, has_room: bool) -> int:
        """Return for what it should be watched now."""
        is_asking = not self.is_open and not self.guest_port
        is_reading = self.is_open and not self.is_client_gone and self.credit > 0 and has_room
        read = selectors.EVENT_READ if is_asking or is_reading else 0
        return read | (selectors.EVENT_WRITE if self.unwritten else 0)


class VsockDevice:
    """Runs from ``__enter__`` to ``__exit__``.

    Attributes:
        vhost_path: where QEMU connects.
        path: where clients of the host connect.
        refused: how many connections the guest has refused.
        next_port: the host port of the next client.
        takes_early: whether a client that comes before the guest's driver waits for it, and does not end the device.
    """

    def __init__(self, vhost_path: Path, path: Path, *, takes_early: bool = True) -> None:
        self.vhost_path = vhost_path
        self.path = path
        self.takes_early = takes_early
        self.refused = 0
        self.next_port = 1 << 30
        self._selector = selectors.DefaultSelector()
        self._queue: deque[bytes] = deque()
        self._connections: dict[int, _Connection] = {}
        self._stop, self._stopper = socket.socketpair()
        self._listeners = [_listening(self.vhost_path), _listening(self.path)]
        self._back_end: BackEnd | None = None
        self._vhost: socket.socket | None = None
        self._kicks: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._watch(self._listeners[0], self._accept_vmm)
        self._watch(self._listeners[1], self._accept_client)
        self._watch(self._stop, lambda: None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopper.close()
        self._thread.join()
        sockets = [*self._listeners, self._stop, *(each.client for each in self._connections.values())]
        for each in (*sockets, *([self._vhost] if self._vhost else [])):
            each.close()
        for ring in self._back_end.rings if self._back_end else ():
            for fd in (ring.kick, ring.call):
                if fd >= 0:
                    os.close(fd)
        self._selector.close()

    def _watch(self, file: socket.socket | int, handle: Callable[[], object]) -> None:
        self._selector.register(file, selectors.EVENT_READ, handle)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stop:
                    return
                key.data()
            self._flush()

    def _accept_vmm(self) -> None:
        self._vhost, _ = self._listeners[0].accept()
        self._back_end = BackEnd(self._vhost, 2, struct.pack("<Q", GUEST_CID))
        self._watch(self._vhost, self._hear_vmm)

    def _hear_vmm(self) -> None:
        assert self._back_end is not None
        assert self._vhost is not None
        if not self._back_end.handle():
            self._selector.unregister(self._vhost)
            return
        for number, ring in enumerate(self._back_end.rings):
            known = self._kicks.get(number, -1)
            if ring.kick != known:
                if known >= 0:
                    self._selector.unregister(known)
                    os.close(known)
                if ring.kick >= 0:
                    os.set_blocking(ring.kick, False)
                    self._watch(ring.kick, functools.partial(os.eventfd_read, ring.kick))
                self._kicks[number] = ring.kick

    def _flush(self) -> None:
        """Move packets both ways as far as there are buffers, and watch for what can go on."""
        if self._back_end is not None and self._back_end.memory is not None:
            memory, (to_guest, from_guest) = self._back_end.memory, self._back_end.rings
            while from_guest.is_ready and (buffer := from_guest.take(memory)) is not None:
                self._receive(buffer.readable)
                from_guest.give_back(memory, buffer)
            while self._queue and to_guest.is_ready and (buffer := to_guest.take(memory)) is not None:
                to_guest.give_back(memory, buffer, self._queue.popleft())
        for connection in list(self._connections.values()):
            if connection.is_guest_gone and not connection.unwritten:
                self._drop(connection)
            else:
                self._set_events(connection, connection.wanted(has_room=len(self._queue) < _MAX_QUEUED))

    def _accept_client(self) -> None:
        client, _ = self._listeners[1].accept()
        if not self.takes_early and not (self._back_end and all(ring.is_ready for ring in self._back_end.rings)):
            client.close()
            raise RuntimeError("a client came before the guest was ready")
        client.setblocking(False)
        self._connections[self.next_port] = _Connection(client, self.next_port)
        self.next_port += 1

    def _set_events(self, connection: _Connection, events: int) -> None:
        if events == connection.events:
            return
        if connection.events:
            self._selector.unregister(connection.client)
        if events:
            self._selector.register(connection.client, events, lambda: self._hear_client(connection))
        connection.events = events

    def _hear_client(self, connection: _Connection) -> None:
        if connection.events & selectors.EVENT_WRITE:
            self._write_client(connection)
        if connection.events & selectors.EVENT_READ:
            if connection.is_open:
                self._read_client(connection)
            else:
                self._read_line(connection)

    def _read_line(self, connection: _Connection) -> None:
        byte = connection.client.recv(1)
        connection.line += byte
        if not byte:
            self._drop(connection)
        elif byte == b"\n":
            connection.guest_port = int(connection.line.split()[1])
            self._send(connection, _REQUEST)

    def _read_client(self, connection: _Connection) -> None:
        try:
            data = connection.client.recv(min(_CHUNK, connection.credit))
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        connection.sent += len(data)
        connection.is_client_gone = not data
        self._send(connection, _RW if data else _SHUTDOWN, data)

    def _write_client(self, connection: _Connection) -> None:
        try:
            count = connection.client.send(connection.unwritten)
        except BlockingIOError:
            return
        except ConnectionError:
            count = len(connection.unwritten)
        del connection.unwritten[:count]
        connection.forwarded += count
        self._send(connection, _CREDIT_UPDATE)

    def _send(self, connection: _Connection, operation: int, data: bytes = b"") -> None:
        flags = _BOTH_WAYS if operation == _SHUTDOWN else 0
        ports = connection.host_port, connection.guest_port
        credit = _ROOM, connection.forwarded % (1 << 32)
        header = _PACKET.pack(_HOST_CID, GUEST_CID, *ports, len(data), _STREAM, operation, flags, *credit)
        self._queue.append(header + data)

    def _receive(self, packet: bytes) -> None:
        _, _, _, host_port, length, _, operation, flags, room, forwarded = _PACKET.unpack_from(packet)
        connection = self._connections.get(host_port)
        if connection is None:
            return
        connection.peer_room, connection.peer_forwarded = room, forwarded
        match operation:
            case 2:  # RESPONSE
                connection.is_open = True
                connection.unwritten += f"OK {host_port}\n".encode()
                connection.forwarded -= len(connection.unwritten)  # the guest did not send it
            case 5:  # RW
                connection.unwritten += packet[_PACKET.size : _PACKET.size + length]
            case 3:  # RST
                self.refused += not connection.is_open
                connection.is_guest_gone = True
            case 4 if flags & _BOTH_WAYS == _BOTH_WAYS:  # SHUTDOWN
                connection.is_guest_gone = True
                self._send(connection, _RST)
            case 7:  # CREDIT_REQUEST
                self._send(connection, _CREDIT_UPDATE)
            case _:  # CREDIT_UPDATE, or one direction is closed
                pass

    def _drop(self, connection: _Connection) -> None:
        self._set_events(connection, 0)
        connection.client.close()
        del self._connections[connection.host_port]


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener
