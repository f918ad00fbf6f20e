"""The agent waits for its turn while much output flows; this process stands for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from guest.agent.patience import Patience
from guest.agent.reactor import Reactor

if TYPE_CHECKING:
    from collections.abc import Iterator


def policy() -> int:
    return os.sched_getscheduler(0)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    yield Reactor()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_it_lasts_as_long_as_output_flows(reactor: Reactor) -> None:
    patience = Patience(reactor)
    assert policy() == os.SCHED_OTHER
    patience.note_flow()
    assert policy() == os.SCHED_BATCH
    reactor.run_once()  # the first look: something has come since
    assert policy() == os.SCHED_BATCH
    patience.note_flow()
    reactor.run_once()
    assert policy() == os.SCHED_BATCH
    reactor.run_once()
    assert policy() == os.SCHED_OTHER
    patience.note_flow()
    assert policy() == os.SCHED_BATCH, "and begins again"
