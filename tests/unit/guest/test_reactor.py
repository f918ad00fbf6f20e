"""The agent's event loop."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from guest.agent.reactor import HANGUP, IN, OUT, Reactor

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for end in ends:
        os.close(end)


def test_a_handler_is_called_once_per_event(pipe: tuple[int, int]) -> None:
    reactor = Reactor()
    seen: list[int] = []
    reactor.watch(pipe[0], seen.append)
    os.write(pipe[1], b"x")
    reactor.run_once()
    reactor.soon(lambda: None)  # nothing has been read: a level-triggered loop would call again
    reactor.run_once()
    assert len(seen) == 1
    assert not seen[0] & HANGUP


def test_other_events_are_told_also_if_they_are_there_already() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reactor = Reactor()
        seen: list[int] = []
        reactor.watch(ours.fileno(), seen.append, IN)
        reactor.soon(lambda: None)  # there is room, which nobody wants to know
        reactor.run_once()
        assert seen == []
        reactor.rewatch(ours.fileno(), IN | OUT)
        reactor.run_once()
        assert seen == [OUT]
        reactor.rewatch(ours.fileno(), IN)
        theirs.send(b"x")
        reactor.run_once()
        assert seen == [OUT, IN]


def test_what_is_unwatched_is_not_called_in_the_same_round(pipe: tuple[int, int]) -> None:
    reactor = Reactor()
    other = os.dup(pipe[0])
    called: list[int] = []

    def handler(descriptor: int, partner: int) -> None:
        called.append(descriptor)
        reactor.unwatch(partner)

    reactor.watch(pipe[0], lambda _: handler(pipe[0], other))
    reactor.watch(other, lambda _: handler(other, pipe[0]))
    os.write(pipe[1], b"x")
    reactor.run_once()
    assert len(called) == 1
    os.close(other)


def test_an_exception_is_logged_and_hurts_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    reactor = Reactor()
    done: list[str] = []
    reactor.soon(lambda: done.append("before"))
    reactor.soon(lambda: done.remove("absent"))
    reactor.soon(lambda: done.append("after"))
    reactor.run_once()
    assert done == ["before", "after"]
    logged = capfd.readouterr().err
    assert '"event": "handler failed"' in logged
    assert "ValueError" in logged
    assert "test_reactor.py:" in logged


def test_what_is_said_soon_by_soon_comes_in_the_next_round() -> None:
    reactor = Reactor()
    done: list[int] = []
    reactor.soon(lambda: reactor.soon(lambda: done.append(2)))
    reactor.run_once()
    assert done == []
    reactor.run_once()
    assert done == [2]


def test_timers_fire_in_time_unless_they_are_cancelled() -> None:
    reactor = Reactor()
    fired: list[str] = []
    reactor.later(0.02, lambda: fired.append("due"))
    reactor.later(0.01, lambda: fired.append("cancelled")).cancel()
    reactor.later(1000, lambda: fired.append("far"))
    while not fired:
        reactor.run_once()
    assert fired == ["due"]
