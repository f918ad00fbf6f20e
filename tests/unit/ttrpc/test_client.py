"""The ttrpc client against a peer that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from common.errors import DeadlineError, ExhaustedError
from common.protobuf import Message, bytes_
from common.protocols.task import Empty
from common.ttrpc import frames
from common.ttrpc.client import MAX_UNREAD, TtrpcClient


class Load(Message):
    data: bytes = bytes_(1)


async def call_for_ever(client: TtrpcClient) -> None:
    load = Load(data=bytes(frames.MAX_PAYLOAD // 2))
    while True:
        with contextlib.suppress(DeadlineError):
            await client.call("test.Sink", "Take", load, Empty, timeout_s=0.001)


def test_calls_to_a_peer_that_does_not_read_are_not_heaped_up() -> None:
    async def call_until_refused() -> int:
        ours, peers = socket.socketpair()
        with peers:
            loop = asyncio.get_running_loop()
            transport, client = await loop.create_connection(lambda: TtrpcClient("the guest"), sock=ours)
            with pytest.raises(ExhaustedError, match="the guest does not read"):
                await call_for_ever(client)
            held = transport.get_write_buffer_size()
            transport.abort()
            return held

    held = asyncio.run(call_until_refused())
    assert MAX_UNREAD < held <= MAX_UNREAD + frames.MAX_PAYLOAD
