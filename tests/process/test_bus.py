"""The bus between real processes: who answers, who is away, what is asked twice, what was missed.

This file is also the service under test: ``python test_bus.py`` runs it.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import zmq
import zmq.asyncio

from common import paths
from common.bus import service as bus_service
from common.bus.client import BusClient
from common.bus.events import REPEATS_S, Publisher, Received, Resync, Subscriber
from common.bus.server import MAX_RUNNING, BusServer
from common.bus.wire import MAX_MESSAGE, VERSION, Call, Empty, Event, News, Reply, Verb, decode, encode
from common.errors import (
    AlreadyExistsError,
    BugError,
    DeadlineError,
    ExhaustedError,
    InterruptedCallError,
    StateError,
    UnavailableError,
    WireError,
)
from common.services.health import HEALTH
from common.testing.isolation import in_event_loop

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.usefixtures("run_dir")

SERVICE = "echo"


class Word(msgspec.Struct, frozen=True, kw_only=True):
    word: str


class Saying(msgspec.Struct, frozen=True, kw_only=True):
    word: str
    audience: str = "you"


class Count(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    pid: int


HOLD = Verb("hold", Word, Count)
STAY = Verb("stay", Empty, Empty)
BOAST = Verb("boast", Empty, Word)
COUNT = Verb("count", Empty, Count)
REFUSE = Verb("refuse", Empty, Empty)
CRASH = Verb("crash", Empty, Empty)
SAY = Verb("say", Saying, Empty)
SAID = Event("said", Word)


async def serve() -> None:
    """Count calls; hold one until its word's file appears; refuse; crash; say."""
    calls = 0

    async def hold(request: Word) -> Count:
        nonlocal calls
        calls += 1
        async with asyncio.timeout(30):
            while request.word and not await asyncio.to_thread(Path(request.word).exists):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return Count(count=calls, pid=os.getpid())

    async def count(_: Empty) -> Count:
        return Count(count=calls, pid=os.getpid())

    async def stay(_: Empty) -> Empty:
        await asyncio.Event().wait()
        return Empty()

    async def boast(_: Empty) -> Word:
        return Word(word="!" * MAX_MESSAGE)

    async def refuse(_: Empty) -> Empty:
        raise StateError("the echo is tired", hint="wait", mood="tired")

    async def crash(_: Empty) -> Empty:
        raise ZeroDivisionError("oh")

    async def say(request: Saying) -> Empty:
        await publisher.publish(SAID, Word(word=request.word), audience=request.audience)
        return Empty()

    async with BusServer(SERVICE) as server, Publisher(SERVICE) as publisher:
        server.register(HOLD, hold)
        server.register(STAY, stay)
        server.register(BOAST, boast)
        server.register(COUNT, count)
        server.register(REFUSE, refuse)
        server.register(CRASH, crash)
        server.register(SAY, say)
        await asyncio.Event().wait()


@contextmanager
def running(*arguments: str, stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=stdout) as process:
        try:
            yield process
        finally:
            process.kill()


async def reached(bus: BusClient) -> None:
    """Wait until the service answers, as a caller that may start before it does."""
    async with asyncio.timeout(30):
        while True:
            try:
                await bus.call(SERVICE, HEALTH, Empty(), timeout_s=5)
            except (UnavailableError, InterruptedCallError):
                continue
            return


async def received(socket: zmq.asyncio.Socket) -> News:
    audience, message = await socket.recv_multipart()
    assert audience == b"you\0"
    return decode(message, News)


@in_event_loop
async def test_calls_answers_and_errors_keep_their_types() -> None:
    with running() as process:
        async with BusClient() as bus:
            await reached(bus)
            health = await bus.call(SERVICE, HEALTH, Empty(), timeout_s=5)
            assert (health.service, health.pid) == (SERVICE, process.pid)
            with pytest.raises(StateError, match=r"the echo is tired \(wait\)") as refused:
                await bus.call(SERVICE, REFUSE, Empty(), timeout_s=5)
            assert refused.value.context == {"mood": "tired"}
            with pytest.raises(BugError, match="ZeroDivisionError"):
                await bus.call(SERVICE, CRASH, Empty(), timeout_s=5)
            assert (await bus.call(SERVICE, COUNT, Empty(), timeout_s=5)).count == 0


@in_event_loop
async def test_a_call_sent_again_runs_once() -> None:
    with running():
        async with BusClient() as bus, BusClient() as other:
            await reached(bus)
            await reached(other)
            first = await bus.call(SERVICE, HOLD, Word(word=""), timeout_s=5, call_id="same")
            again = await other.call(SERVICE, HOLD, Word(word=""), timeout_s=5, call_id="same")
            assert first == again
            assert (await bus.call(SERVICE, HOLD, Word(word=""), timeout_s=5)).count == 2


@in_event_loop
async def test_a_call_sent_again_while_it_runs_joins_it(run_dir: Path) -> None:
    with running():
        async with BusClient() as bus, BusClient() as other, asyncio.TaskGroup() as tasks:
            await reached(bus)
            await reached(other)
            request = Word(word=str(run_dir / "go"))
            first = tasks.create_task(bus.call(SERVICE, HOLD, request, timeout_s=20, call_id="same"))
            while (await bus.call(SERVICE, COUNT, Empty(), timeout_s=5)).count == 0:
                pass
            again = tasks.create_task(other.call(SERVICE, HOLD, request, timeout_s=20, call_id="same"))
            await other.call(SERVICE, HEALTH, Empty(), timeout_s=5)
            (run_dir / "go").touch()
            assert await first == await again
            assert (await first).count == 1


@in_event_loop
async def test_a_peer_that_is_down_is_an_error_and_heals() -> None:
    async with BusClient() as bus:
        with pytest.raises(UnavailableError, match="service echo is down"):
            await bus.call(SERVICE, HEALTH, Empty(), timeout_s=30)
        with running() as process:
            await reached(bus)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises((UnavailableError, InterruptedCallError)):
                await bus.call(SERVICE, HEALTH, Empty(), timeout_s=30)
        with running():
            await reached(bus)


@in_event_loop
async def test_a_call_whose_peer_dies_is_interrupted_not_lost(run_dir: Path) -> None:
    with running() as process:
        async with BusClient() as bus:
            await reached(bus)

            async def kill_it_in_the_middle() -> None:
                while (await bus.call(SERVICE, COUNT, Empty(), timeout_s=5)).count == 0:
                    pass
                process.kill()

            call = bus.call(SERVICE, HOLD, Word(word=str(run_dir / "never")), timeout_s=60)
            outcome, _ = await asyncio.gather(call, kill_it_in_the_middle(), return_exceptions=True)
            assert isinstance(outcome, InterruptedCallError)
            assert "outcome is unknown" in outcome.message


@in_event_loop
async def test_a_call_in_flight_survives_a_quick_restart(run_dir: Path) -> None:
    async with BusClient() as bus, asyncio.TaskGroup() as tasks:
        with running() as first:
            await reached(bus)
            call = tasks.create_task(bus.call(SERVICE, HOLD, Word(word=str(run_dir / "go")), timeout_s=60))
            while (await bus.call(SERVICE, COUNT, Empty(), timeout_s=5)).count == 0:
                pass
            # The successor waits for the lock's holder to go, so its start-up is over when the first one dies.
            with running("--after", str(first.pid), stdout=subprocess.PIPE) as second:
                assert second.stdout is not None
                assert await asyncio.to_thread(second.stdout.readline) == b"ready\n"
                first.kill()
                (run_dir / "go").touch()
                assert (await call).pid == second.pid


@in_event_loop
async def test_an_expired_deadline_is_said(run_dir: Path) -> None:
    with running():
        async with BusClient() as bus:
            await reached(bus)
            with pytest.raises(DeadlineError, match=r"did not answer hold within 0\.2 s"):
                await bus.call(SERVICE, HOLD, Word(word=str(run_dir / "never")), timeout_s=0.2)


@in_event_loop
async def test_a_call_that_comes_too_late_is_not_run_and_can_be_repeated() -> None:
    with running():
        async with BusClient() as bus:
            await reached(bus)
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as late:
                late.connect(f"ipc://{paths.bus_dir()}/{SERVICE}")
                call = Call(v=VERSION, call_id="same", request_id="", service=SERVICE, verb=HOLD.name, deadline_ns=1)
                await late.send(encode(call))
                fault = decode(await late.recv(), Reply).fault
            assert fault is not None
            assert (fault.kind, "nothing was done" in fault.message) == ("DeadlineError", True)
            assert (await bus.call(SERVICE, HOLD, Word(word=""), timeout_s=5, call_id="same")).count == 1


@in_event_loop
async def test_calls_beyond_the_bound_are_refused() -> None:
    with running():
        async with BusClient() as bus:
            await reached(bus)
            calls = [
                asyncio.gather(bus.call(SERVICE, STAY, Empty(), timeout_s=60), return_exceptions=True)
                for _ in range(MAX_RUNNING + 1)
            ]
            ended, others = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            ((error,),) = (call.result() for call in ended)
            assert isinstance(error, ExhaustedError)
            assert error.message == f"echo has {MAX_RUNNING} calls in flight"
            for call in others:
                call.cancel()
            await asyncio.gather(*others, return_exceptions=True)


@in_event_loop
async def test_a_reply_that_is_too_large_costs_its_caller_alone() -> None:
    with running():
        async with BusClient() as bus:
            await reached(bus)
            with pytest.raises(WireError, match="exceeds the limit"):
                await bus.call(SERVICE, BOAST, Empty(), timeout_s=5)
            await bus.call(SERVICE, HEALTH, Empty(), timeout_s=5)


@in_event_loop
async def test_a_second_server_is_refused_and_the_first_lives_on() -> None:
    with running():
        async with BusClient() as bus:
            await reached(bus)
            with pytest.raises(AlreadyExistsError, match="another process answers for echo"):
                async with BusServer(SERVICE):
                    pass
            await bus.call(SERVICE, HEALTH, Empty(), timeout_s=5)


@in_event_loop
async def test_events_arrive_in_order_and_a_restart_shows() -> None:
    async with BusClient() as bus, Subscriber({SERVICE: "you"}) as news:
        with running():
            await reached(bus)
            assert await anext(news) == Resync(service=SERVICE)
            for word in ("a", "b"):
                await bus.call(SERVICE, SAY, Saying(word=word), timeout_s=5)
            heard = [await anext(news), await anext(news)]
            assert [item.body_of(SAID) for item in heard if isinstance(item, Received)] == [
                Word(word="a"),
                Word(word="b"),
            ]
        with running():
            await reached(bus)
            assert await anext(news) == Resync(service=SERVICE)


@in_event_loop
async def test_what_concerns_others_is_not_heard_and_leaves_no_gap() -> None:
    with running():
        async with BusClient() as bus, Subscriber({SERVICE: "you"}) as yours, Subscriber({SERVICE: "youth"}) as others:
            await reached(bus)
            assert await anext(yours) == await anext(others) == Resync(service=SERVICE)
            for word, audience in (("a", "you"), ("b", "youth"), ("c", "youth"), ("d", "you")):
                await bus.call(SERVICE, SAY, Saying(word=word, audience=audience), timeout_s=5)
            for news, words in ((yours, "ad"), (others, "bc")):
                heard = [await anext(news), await anext(news)]
                assert [item.body_of(SAID) for item in heard if isinstance(item, Received)] == [
                    Word(word=word) for word in words
                ]


@in_event_loop
async def test_whoever_subscribes_later_hears_at_once_where_it_stands() -> None:
    with running():
        async with BusClient() as bus, Subscriber({SERVICE: "you"}) as first:
            await reached(bus)
            assert await anext(first) == Resync(service=SERVICE)
            async with Subscriber({SERVICE: "you"}) as second:
                assert await anext(second) == Resync(service=SERVICE)


@in_event_loop
async def test_the_number_of_a_last_event_is_repeated_and_nothing_without_one() -> None:
    """Whoever lost the event learns it from the repeat; where nothing happens nobody is woken up."""
    with running():
        async with BusClient() as bus:
            await reached(bus)
            context = zmq.asyncio.Context()
            with context, context.socket(zmq.SUB) as socket:
                socket.setsockopt(zmq.SUBSCRIBE, b"you\0")
                socket.connect(f"ipc://{paths.bus_dir()}/{SERVICE}.events")
                greeting = await received(socket)
                assert not await socket.poll(3 * 1000 * REPEATS_S[0])
                await bus.call(SERVICE, SAY, Saying(word="a"), timeout_s=5)
                event, repeat = [await received(socket) for _ in range(2)]
            assert [(news.topic, news.sequence) for news in (greeting, event, repeat)] == [
                ("", 0),
                (SAID.topic, 1),
                ("", 1),
            ]


def _wait_for_end(pid: int) -> None:
    ended = os.pidfd_open(pid)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    select.select([ended], [], [])
    os.close(ended)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--after"]:
        _wait_for_end(int(sys.argv[2]))
    sys.exit(bus_service.run("echo", serve))
