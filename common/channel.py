"""What travels between host and guest. Part of the guest; no I/O here.

One channel carries ttrpc and others carry standard streams, in frames that are the same on every kind of device.

**virtio-serial.** One port ``kata.agent`` carries ttrpc, and ports ``kata.stream.<n>`` for standard streams,
one each way. virtio-serial has no connections: bytes that one end left behind reach the next user of
the port. Both kinds of port therefore say whose bytes they are.

*Agent port.* Whoever opens it sends a hello: ``b"KATA-HI1"`` and 16 random bytes. The agent drops what it was reading
and writing and answers ``b"KATA-OK1"`` with the same 16 bytes; the host ignores everything before them. After that,
ttrpc frames. The agent also forgets its half of a conversation when the port reports that the host's end closed.

*Stream port.* Frames of an 8-byte header and a payload::

    0        4         8
    | stream | length  | payload (length bytes, at most 512 KiB)       big-endian; length 0 = end of the stream

``stream`` is ``generation << 8 | port``: the host draws a generation for each use of a port and never draws one twice
in a VM, so frames of an earlier use are recognised and dropped. This number is what the agent protocol's
``stdin_port``, ``stdout_port`` and ``stderr_port`` carry; stdin and stdout of one process may share a port, since they
go opposite ways.

Two numbers are none: 0, which is what a message says that says nothing, means that the stream is read and written by
calls, as upstream's shim does (``ReadStdout``, ``WriteStdin``); ``NO_STREAM`` that there is no such stream.

What a port has taken and the host has not read lies in the guest's memory, up to 128 buffers of it. So that these may
be large, the agent sends no more than ``WINDOW`` bytes in large ones that the host has not said to have handed on (the
call ``Taken``). A host that says so is waited for; to one that never does the rest goes in small ones.

**vsock.** A connection has a beginning and an end, so there is no hello: the agent listens on port 1024, as upstream's
does, for any number of conversations in ttrpc. On port 1028 it takes stream connections: the host sends the stream's
number (4 bytes, big-endian), the agent sends it back as soon as it knows the connection, and then frames as above
travel both ways. The frame of length 0 still ends a stream, since not every VMM hands on that one direction has ended.
The host closes the connection when it has no more use for it.

A vsock address of the host's kernel is open to every user of the host. There the guest's kernel command line says
``agent.vsock_reserved``, and the agent takes only connections from ports below 1024, which only root can bind
(``LAST_RESERVED_PORT`` in net/vmw_vsock/af_vsock.c).
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT_PORT = "kata.agent"
STREAM_PORT = "kata.stream."
STREAM_PORTS = 29
"""Stream ports of a VM: QEMU's virtio-serial bus numbers 31 ports from 0, which is reserved for a console, and one is
the agent's."""

AGENT_VSOCK_PORT = 1024
"""Where Kata's agents listen for ttrpc."""
STREAM_VSOCK_PORT = 1028
"""Where our agent takes stream connections. Upstream uses 1025 to 1027: log, debug console, passed descriptors."""
RESERVED_PARAMETER = "agent.vsock_reserved"
"""Has the agent refuse vsock connections from other ports than these."""
RESERVED_PORTS = range(1, 1024)

STREAM_NUMBER = struct.Struct(">I")
"""What a stream connection begins with."""

BY_CALL = 0
NO_STREAM = 0xFFFF_FFFF

HELLO = b"KATA-HI1"
HELLO_REPLY = b"KATA-OK1"
NONCE_SIZE = 16

MAX_CHUNK = 64 << 10
"""Most of a frame from host to guest, and of a call, in bytes."""
MAX_FRAME = 512 << 10
"""Most of any frame's payload, in bytes."""
WINDOW = 4 << 20
"""Bytes of output that may be in large buffers on their way."""
HEADER = struct.Struct(">II")
_MAX_GENERATION = (1 << 24) - 1


class ChannelError(ValueError):
    """The peer sent what this protocol does not allow."""


def stream_number(generation: int, port: int) -> int:
    """Return the number of one use of a port.

    Raises:
        ValueError: the generation is not within 1..2**24-1 or there is no such port.
    """
    if not 1 <= generation <= _MAX_GENERATION or not 0 <= port < STREAM_PORTS:
        raise ValueError(f"no stream port {port} in generation {generation}")
    return generation << 8 | port


def port_of(stream: int) -> int:
    """Return the port that a stream number names.

    Raises:
        ChannelError: there is no such port.
    """
    port = stream & 0xFF
    if port >= STREAM_PORTS:
        raise ChannelError(f"stream {stream:#x} names port {port}; a VM has {STREAM_PORTS}")
    return port


class StreamDecoder:
    """Picks one stream's payload out of a port's bytes; holds no more than part of a header.

    Attributes:
        stream: the stream's number.
        is_ended: whether its end has come.
    """

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.is_ended = False
        self._header = b""
        self._frame = stream
        self._missing = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether all of every frame that has begun has come."""
        return not self._missing and not self._header

    @property
    def missing(self) -> int:
        """How many bytes of this stream come next, with nothing in between."""
        return self._missing if self._frame == self.stream and not self.is_ended else 0

    def skip(self, size: int) -> None:
        """Note that so many of the ``missing`` bytes have come another way."""
        self._missing -= size

    def begin(self, stream: int) -> None:
        """Pick another stream from here on: the next use of the port. A frame that has begun stays the last one's."""
        self.stream = stream
        self.is_ended = False

    def feed(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """Take bytes as they came; yield payload as parts of them. ``is_ended`` is set by the stream's end.

        Raises:
            ChannelError: a frame is longer than ``MAX_FRAME``.
        """
        left = memoryview(data)
        while left:
            if not self._missing:
                left = self._read_header(left)
            else:
                part = left[: self._missing]
                self._missing -= len(part)
                left = left[len(part) :]
                if self._frame == self.stream and not self.is_ended:
                    yield part

    def _read_header(self, data: memoryview) -> memoryview:
        """Take what is missing of a header; return what is behind it."""
        size = HEADER.size - len(self._header)
        self._header += bytes(data[:size])
        if len(self._header) == HEADER.size:
            self._frame, self._missing = HEADER.unpack(self._header)
            self._header = b""
            if self._missing > MAX_FRAME:
                raise ChannelError(f"frame of {self._missing} bytes on a stream port; the limit is {MAX_FRAME}")
            if self._frame == self.stream and not self._missing:
                self.is_ended = True
        return data[size:]
