"""The agent port: conversations that begin with a hello (``common.channel``), then ttrpc frames.

A port has no connections, so where a conversation ends must be found in the bytes. Two facts of virtio-serial help:
QEMU hands every chunk that it reads from the host's socket to the guest in a buffer of its own, and one read(2) of the
port returns at most one buffer (drivers/char/virtio_console.c, fill_readbuf). Bytes of two conversations are thus never
in one chunk. A conversation ends where

- the port reports that the host's end is closed: what remains of it is read and dropped;
- a hello begins where a frame could: as a frame, its first bytes would announce more than ttrpc allows;
- a chunk in the middle of a frame is exactly a hello, which the host sends alone: that its end was closed in between
  went by unseen.

Answers to calls of an earlier conversation are dropped, since their stream numbers now belong to other calls.
"""

from __future__ import annotations

import posix

from common.channel import HELLO, HELLO_REPLY, NONCE_SIZE
from guest.agent.conversation import READ_SIZE, Conversation
from guest.agent.reactor import HANGUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Router

_HELLO_SIZE = len(HELLO) + NONCE_SIZE


class Connection:
    """Owns the agent port and finds in its bytes where one conversation ends and the next begins."""

    def __init__(self, reactor: Reactor, port: int, router: Router) -> None:
        self._port = port
        self._router = router
        self._conversation = Conversation(port, router)
        self._is_greeted = False
        reactor.watch(port, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & HANGUP:
            # First: the host may be back already, and what is read next be its hello.
            self._begin(is_greeted=False)
        self._conversation.flush()
        self._read()

    def _read(self) -> None:
        while True:
            try:
                chunk = posix.read(self._port, READ_SIZE)
            except BlockingIOError:
                return
            if not chunk:  # the host's end is closed
                self._begin(is_greeted=False)
                return
            self._receive(chunk)

    def _receive(self, chunk: bytes) -> None:
        if self._is_hello(chunk):
            self._begin(is_greeted=True)
            self._conversation.send(HELLO_REPLY + chunk[len(HELLO) : _HELLO_SIZE])
            chunk = chunk[_HELLO_SIZE:]
        if self._is_greeted:
            self._conversation.receive(chunk)

    def _begin(self, *, is_greeted: bool) -> None:
        """Forget all of the last conversation."""
        self._conversation.end()
        self._conversation = Conversation(self._port, self._router)
        self._is_greeted = is_greeted

    def _is_hello(self, chunk: bytes) -> bool:
        begins_so = chunk.startswith(HELLO) and len(chunk) >= _HELLO_SIZE
        return begins_so and (self._conversation.is_between_frames or len(chunk) == _HELLO_SIZE)
