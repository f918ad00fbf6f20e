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
    | stream | length  | payload (length bytes, at most 64 KiB)        big-endian; length 0 = end of the stream

``stream`` is ``generation << 8 | port``: the host draws a generation for each use of a port and never draws one twice
in a VM, so frames of an earlier use are recognised and dropped. This number is what the agent protocol's
``stdin_port``, ``stdout_port`` and ``stderr_port`` carry; stdin and stdout of one process may share a port, since they
go opposite ways.

Two numbers are none: 0, which is what a message says that says nothing, means that the stream is read and written by
calls, as upstream's shim does (``ReadStdout``, ``WriteStdin``); ``NO_STREAM`` that there is no such stream.

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
    """Picks one stream's payload out of a port's bytes; holds at most one frame.

    Attributes:
        stream: the stream's number.
        is_ended: whether its end has come.
    """

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._buffer = bytearray()
        self.is_ended = False

    def begin(self, stream: int) -> None:
        """Pick another stream from here on: the next use of the port. Half a frame that has come already stays."""
        self.stream = stream
        self.is_ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes as they came; yield each payload. ``is_ended`` is set by the stream's end.

        Raises:
            ChannelError: a frame is longer than ``MAX_CHUNK``.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            stream, length = HEADER.unpack_from(self._buffer)
            if length > MAX_CHUNK:
                raise ChannelError(f"frame of {length} bytes on a stream port; the limit is {MAX_CHUNK}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            if stream == self.stream and not self.is_ended:
                if payload:
                    yield payload
                else:
                    self.is_ended = True
