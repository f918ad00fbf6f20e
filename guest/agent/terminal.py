"""Terminals: the runtime makes one inside the container and sends us its master side over a socket.

The protocol is runc's: one message with one descriptor on the Unix socket that ``--console-socket`` names
(https://github.com/opencontainers/runc/blob/main/docs/terminals.md).
"""

from __future__ import annotations

import _socket
import fcntl
import posix
import struct

_TIOCSWINSZ = 0x5414
_SIZE = struct.Struct("HHHH")  # struct winsize (ioctl_tty(2)): rows, columns and two that are not used
_DESCRIPTOR = struct.Struct("i")
_MAX_NAME = 4096


class ConsoleSocket:
    """Where the runtime will send the terminal."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.setblocking(False)

    def receive(self) -> int:
        """Return the terminal's master side. The runtime has sent it before it exits, so there is nothing to wait for.

        Raises:
            OSError: it sent none.
        """
        descriptor, _ = self._listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  # what socket.socket.accept() calls
        connection = _socket.socket(fileno=descriptor)
        _, ancillary, _, _ = connection.recvmsg(_MAX_NAME, _socket.CMSG_SPACE(_DESCRIPTOR.size))
        connection.close()
        (master,) = _DESCRIPTOR.unpack(ancillary[0][2])
        posix.set_inheritable(master, False)
        return int(master)

    def close(self) -> None:
        """Remove the socket."""
        self._listener.close()
        posix.unlink(self.path)


def resize(master: int, rows: int, columns: int) -> None:
    """Set a terminal's size in characters; whoever runs in it gets SIGWINCH."""
    fcntl.ioctl(master, _TIOCSWINSZ, _SIZE.pack(rows, columns, 0, 0))
