"""One host per test worker: booting VMs is what these tests spend their time on, starting containerd need not be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.testing.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def host() -> Iterator[Stack]:
    """A running host, shared by the worker's tests."""
    with Stack() as stack:
        yield stack


@pytest.fixture
def stack(host: Stack) -> Iterator[Stack]:
    """The host, with its configuration as shipped; fails the test that leaves something of a container behind."""
    host.write_config()
    yield host
    assert host.ctr("task", "ls", "-q").stdout == b""
    assert host.remains() == []
