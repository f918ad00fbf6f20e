"""Frames of a process's output (``common.channel``) on their way from its pipe or terminal into a port.

*Copied*: a frame is read into memory and written with one write(2). So it goes from a terminal, and into a connection.

*Spliced*: what is in a pipe goes into a virtio-serial port by its pages, which are not copied (port_fops_splice_write
in drivers/char/virtio_console.c). The pages pass through a pipe of ours in which the header is before them, so that
header and payload are one virtio buffer. For little output that is more work than to copy it, and the pages that are in
the port are nobody's memory, so there may be ``WINDOW`` bytes of them.
"""

from __future__ import annotations

import fcntl
import posix

from common.channel import HEADER, WINDOW
from guest.agent.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BUFFER = 32 << 10
"""Largest write that a port takes as one buffer (drivers/char/virtio_console.c, port_fops_write)."""
_PAGE = 4096
_SPLICED = 127 * _PAGE
"""Most of a spliced frame. With the header's page that is as many pages as QEMU's queue has places, 128
(hw/char/virtio-serial-bus.c), which no buffer may exceed (virtio 1.2, 2.7.5.3.1)."""
_MUCH = 64 << 10
"""What a pipe has in it that is full, as it comes from the kernel (pipe(7)): its process was waiting for us."""
_PIPE_SIZE = 1 << 20
"""The most that a pipe may have (/proc/sys/fs/pipe-max-size)."""
_ENOMEM = 12
_FIONREAD = 0x541B
_F_SETPIPE_SZ = 1031
_S_IFMT, _S_IFIFO = 0o170000, 0o010000  # inode(7)


class WindowClosedError(Exception):
    """There is output, which waits until the host says that it has handed on more."""


class CopiedFrames:
    """One frame at a time of one stream."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._frame = memoryview(bytearray(_BUFFER))
        self._unsent = self._frame[:0]

    def fill(self, source: int) -> int:
        """Take the next frame from a descriptor; return the payload's size in bytes. Nothing is a frame: the end.

        Raises:
            BlockingIOError: there is nothing now.
            WindowClosedError: there is something, for later.
            OSError: a terminal is gone.
        """
        size = posix.readv(source, [self._frame[HEADER.size :]])
        self._pack(size)
        return size

    def end(self) -> None:
        """Make the end the next frame."""
        self._pack(0)

    def send(self, port: int) -> None:
        """Hand all of the frame to a port.

        Raises:
            BlockingIOError: the port does not take all of it now; the rest is kept.
            OSError: the host has closed the connection.
        """
        while self._unsent:
            self._unsent = self._unsent[posix.write(port, self._unsent) :]

    def allow(self, size: int) -> None:
        """Note that the host has handed on so many bytes."""

    def close(self) -> None:
        """Give up what it holds."""

    def _pack(self, size: int) -> None:
        HEADER.pack_into(self._frame, 0, self._stream, size)
        self._unsent = self._frame[: HEADER.size + size]


class SplicedFrames(CopiedFrames):
    """From a pipe into a virtio-serial port. Nobody else reads the pipe, so what it has it keeps.

    Args:
        stream: the stream's number.
        on_much: is called for each large frame.
    """

    def __init__(self, stream: int, on_much: Callable[[], None]) -> None:
        super().__init__(stream)
        self._on_much = on_much
        self._source = -1
        self._exit = self._entry = -1
        self._staged = 0
        self._missing = 0
        self._window = WINDOW
        self._is_told = False

    def fill(self, source: int) -> int:
        """See the base class."""
        available = int.from_bytes(fcntl.ioctl(source, _FIONREAD, bytes(4)), "little")
        size = min(available, _SPLICED, self._window)
        if size < _PAGE:
            if self._is_told and available >= _PAGE:
                raise WindowClosedError
            return super().fill(source)
        if self._entry < 0:
            self._open(source)
        self._source = source
        self._staged = posix.write(self._entry, HEADER.pack(self._stream, size))
        self._missing = size
        self._window -= size
        if size >= _MUCH:
            self._on_much()
        return size

    def send(self, port: int) -> None:
        """See the base class."""
        super().send(port)
        while self._staged or self._missing:
            # All that is in our pipe goes at once: of a part, the driver would send its list of pages beyond the end.
            # Pages that are not full may be more than our pipe holds: then the rest follows in another buffer.
            if self._missing and self._staged <= HEADER.size:
                moved = posix.splice(self._source, self._entry, self._missing)
                self._missing -= moved
                self._staged += moved
            sent = posix.splice(self._exit, port, self._staged)
            if not sent:  # the driver had no memory for the list, and has dropped what was in our pipe
                log("error", "output lost, the port could not take it", stream=self._stream, size=self._staged)
                raise OSError(_ENOMEM, posix.strerror(_ENOMEM))
            self._staged -= sent

    def allow(self, size: int) -> None:
        """See the base class."""
        self._is_told = True
        self._window = min(self._window + size, WINDOW)

    def close(self) -> None:
        """See the base class."""
        if self._entry >= 0:
            posix.close(self._entry)
            posix.close(self._exit)
            self._entry = self._exit = -1

    def _open(self, source: int) -> None:
        """Make our pipe, and let the process be further ahead of us: the more there is at once, the less it costs."""
        self._exit, self._entry = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        for pipe in (source, self._entry):
            fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_SIZE)


def is_pipe(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe's, and no terminal's."""
    return posix.fstat(descriptor).st_mode & _S_IFMT == _S_IFIFO
