"""A call that is sent before its sender can wait: done once, whichever of the two arrives first."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from common import log
from common.bus.client import BusClient
from common.bus.early import EarlyCall
from common.bus.server import BusServer
from common.bus.wire import Empty, Verb

pytestmark = pytest.mark.usefixtures("run_dir")


class Count(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    request_id: str


COUNT = Verb("count", Empty, Count)


class Counter:
    """A service that counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0
        self.was_asked = asyncio.Event()
        self.server = BusServer("counter")
        self.server.register(COUNT, self._count)

    async def _count(self, _: Empty) -> Count:
        self.count += 1
        self.was_asked.set()
        return Count(count=self.count, request_id=log.request_id.get())


def early() -> EarlyCall:
    return EarlyCall("counter", COUNT, Empty(), timeout_s=30)


async def repeat(call: EarlyCall) -> Count:
    async with BusClient() as bus:
        return await bus.call("counter", COUNT, Empty(), timeout_s=30, call_id=call.call_id)


def test_the_second_call_finds_the_answer_of_the_first() -> None:
    async def run() -> None:
        counter = Counter()
        async with asyncio.timeout(60), counter.server:
            call = early()
            await counter.was_asked.wait()
            answer = await repeat(call)
            call.close()
        assert answer == Count(count=1, request_id=call.request_id)
        assert counter.count == 1

    asyncio.run(run())


def test_an_early_call_waits_for_a_service_that_is_starting() -> None:
    async def run() -> None:
        call = early()
        counter = Counter()
        async with asyncio.timeout(60), counter.server:
            await counter.was_asked.wait()
            call.close()
        assert counter.count == 1

    asyncio.run(run())


def test_a_closed_call_does_not_arrive_later() -> None:
    async def run() -> None:
        call = early()
        call.close()
        counter = Counter()
        async with asyncio.timeout(60), counter.server:
            assert (await repeat(early_closed())).count == 1
        assert counter.count == 1

    def early_closed() -> EarlyCall:
        call = early()
        call.close()
        return call

    asyncio.run(run())
