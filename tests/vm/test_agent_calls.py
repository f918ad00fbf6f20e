"""Streams by calls, as upstream's shim has them: its own process of a container, an exec, a terminal."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

import pytest

from common import status
from common.protocols.agent import (
    AGENT_SERVICE,
    SHARE_MOUNT_POINT,
    CloseStdinRequest,
    ContainerRequest,
    CreateContainerRequest,
    Empty,
    ExecProcessRequest,
    ReadStreamRequest,
    ReadStreamResponse,
    RemoveContainerRequest,
    SignalProcessRequest,
    WaitProcessRequest,
    WaitProcessResponse,
    WriteStreamRequest,
    WriteStreamResponse,
)
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import GuestSandbox, container_spec

if TYPE_CHECKING:
    from common.protobuf import Message

M = TypeVar("M", bound="Message")
_IDS = (f"called{n}" for n in itertools.count())


class Called:
    """A container whose process is driven with upstream's calls."""

    def __init__(self, guest: GuestSandbox, *args: str, terminal: bool = False) -> None:
        self.id = next(_IDS)
        self._guest = guest
        spec = container_spec(f"{SHARE_MOUNT_POINT}/base/rootfs", *args, terminal=terminal)
        self._ask("CreateContainer", CreateContainerRequest(container_id=self.id, exec_id=self.id, oci=spec), Empty)

    def _ask(self, method: str, request: Message, reply: type[M]) -> M:
        return self._guest.agent.ask(method, request, reply)

    def start(self) -> None:
        self._ask("StartContainer", ContainerRequest(container_id=self.id), Empty)

    def exec(self, exec_id: str, *args: str) -> None:
        process = container_spec("/", *args).process
        self._ask("ExecProcess", ExecProcessRequest(container_id=self.id, exec_id=exec_id, process=process), Empty)

    def write(self, data: bytes, exec_id: str = "") -> int:
        request = WriteStreamRequest(container_id=self.id, exec_id=exec_id or self.id, data=data)
        return self._ask("WriteStdin", request, WriteStreamResponse).len

    def close_stdin(self) -> None:
        self._ask("CloseStdin", CloseStdinRequest(container_id=self.id, exec_id=self.id), Empty)

    def begin_read(self, method: str = "ReadStdout", exec_id: str = "", size: int = 4096) -> int:
        request = ReadStreamRequest(container_id=self.id, exec_id=exec_id or self.id, len=size)
        return self._guest.agent.begin(AGENT_SERVICE, method, request)

    def finish_read(self, stream: int) -> bytes:
        return self._guest.agent.finish(stream, ReadStreamResponse).data

    def read(self, method: str = "ReadStdout", exec_id: str = "", size: int = 4096) -> bytes:
        return self.finish_read(self.begin_read(method, exec_id, size))

    def read_all(self, method: str = "ReadStdout", exec_id: str = "") -> bytes:
        return b"".join(iter(lambda: self.read(method, exec_id, 1 << 20), b""))

    def wait(self, exec_id: str = "") -> int:
        request = WaitProcessRequest(container_id=self.id, exec_id=exec_id or self.id)
        return self._ask("WaitProcess", request, WaitProcessResponse).status

    def kill(self) -> None:
        self._ask("SignalProcess", SignalProcessRequest(container_id=self.id, exec_id="", signal=9), Empty)

    def remove(self) -> None:
        self._ask("RemoveContainer", RemoveContainerRequest(container_id=self.id), Empty)


def test_a_filter(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "cat; echo wrong >&2; exit 3")
    early = called.begin_read()
    called.start()
    assert called.write(b"right") == 5
    assert called.finish_read(early) == b"right", "asked for before the start"
    called.close_stdin()
    assert called.read() == b""
    assert called.read_all("ReadStderr") == b"wrong\n"
    assert called.wait() == 3
    called.remove()


def test_more_than_a_pipe_holds_both_ways(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "cat > /tmp/x; cat /tmp/x")
    called.start()
    data = bytes(range(256)) * 2048
    assert called.write(data) == len(data)
    assert called.write(b"") == 0, "which is the end, as upstream's other runtime says it"
    assert called.read_all() == data
    assert called.wait() == 0
    called.remove()


def test_the_end_is_told_though_nobody_reads(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "echo unread")
    called.start()
    assert called.wait() == 0
    assert called.read_all() == b"unread\n", "until the container is removed"
    called.remove()


def test_a_process_left_behind_does_not_keep_the_stream_open(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "echo said; exec sleep 1000")
    called.start()
    assert called.read() == b"said\n"
    pending = called.begin_read()
    called.kill()
    assert called.finish_read(pending) == b""
    assert called.wait() == 137
    called.remove()


def test_an_exec(guest: GuestSandbox) -> None:
    called = Called(guest, "sleep", "1000")
    called.start()
    called.exec("e", "cat")
    assert called.write(b"x", "e") == 1
    assert called.read(exec_id="e") == b"x"
    called.write(b"", "e")
    assert called.read(exec_id="e") == b""
    assert called.wait("e") == 0
    with pytest.raises(AgentError) as refused:
        called.read(exec_id="e")
    assert refused.value.code == status.NOT_FOUND, "as with upstream's agent, which forgets it too"
    called.kill()
    called.remove()


def test_a_terminal(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "read line; echo got $line", terminal=True)
    called.start()
    called.write(b"a line\n")
    assert called.read_all().replace(b"\r", b"").endswith(b"got a line\n")
    assert called.wait() == 0
    called.remove()


def test_a_process_that_reads_no_more_refuses_input(guest: GuestSandbox) -> None:
    called = Called(guest, "sh", "-c", "exec <&-; echo closed; exec sleep 1000")
    called.start()
    called.read()
    with pytest.raises(AgentError, match="reads no more"):
        called.write(bytes(1 << 20))
    called.kill()
    called.remove()
