"""One host per test worker: booting VMs is what these tests spend their time on, starting containerd need not be."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import grpc
import pytest

from common.protobuf import Message, repeated, string
from common.protocols.events import Envelope
from common.testing.containers import RUNC
from common.testing.stack import RUNTIME, Stack

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path


_BOOT_TIMEOUT_S = 120
"""Longer than the default: other tests and their VMs take their part of the machine."""


@pytest.fixture(scope="session")
def host(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running host, shared by the worker's tests; fails the last of them if it leaves something behind."""
    containerd: Path | None = pytestconfig.getoption("containerd")
    scratch = tmp_path_factory.mktemp("blockfile") / "scratch"
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", str(scratch), "16M"], check=True)
    blockfile = {"scratch_file": str(scratch), "fs_type": "ext4"}
    plugins = {
        "io.containerd.snapshotter.v1.blockfile": blockfile,
        "io.containerd.snapshotter.v1.erofs": {"default_size": "16MiB"},
    }
    with Stack(programs=containerd and containerd.resolve(), plugins=plugins) as stack:
        yield stack
    assert stack.left_behind == []


@pytest.fixture
def stack(host: Stack, leaves_nothing: set[int]) -> Iterator[Stack]:
    """The host, with its configuration as it was; fails the test that leaves something of a container behind."""
    host.write_config(agent={"dial_timeout": _BOOT_TIMEOUT_S})
    yield host
    leaves_nothing.add(host.containerd.pid)  # a test may have restarted it
    tasks = _remove(host, "task", "rm", "-f")
    containers = _remove(host, "container", "rm")
    assert (tasks, containers, host.remains()) == ([], [], [])


class SubscribeRequest(Message):
    """``containerd.services.events.v1.SubscribeRequest``."""

    filters: list[str] = repeated(string(1))


@pytest.fixture
def task_events(stack: Stack) -> Iterator[Iterator[Envelope]]:
    """What containerd publishes of tasks from the test's beginning on."""
    with grpc.insecure_channel(f"unix://{stack.socket}") as channel:
        subscribe = channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            request_serializer=Message.encode,
            response_deserializer=Envelope.decode,
        )
        events = subscribe(SubscribeRequest(filters=['topic~="/tasks/"']), timeout=300)
        channel.unary_unary("/containerd.services.version.v1.Version/Version")(b"")  # what came before it is at work
        yield events
        events.cancel()


@pytest.fixture(params=[RUNC, RUNTIME], ids=["runc", "kata"])
def runtime(request: pytest.FixtureRequest) -> str:
    """The reference and ours, one after the other."""
    return str(request.param)


def _remove(host: Stack, kind: str, *verb: str) -> list[str]:
    """Remove what there is of a kind, so that one failure is not everybody's; return the names of it."""
    names = host.ctr(kind, "ls", "-q").stdout.decode().split()
    for name in names:
        host.ctr(kind, *verb, name)
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the host logged last."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and host is not None and host.root.exists():
        report.sections.append(("host's logs", host.logs()))
    return report
