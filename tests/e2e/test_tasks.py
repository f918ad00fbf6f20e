"""A container that goes on: exec, kill, listing, events."""

from __future__ import annotations

import os
import pty
import subprocess
from typing import TYPE_CHECKING

import grpc

from common.protobuf import Message, repeated, string
from common.protocols.events import Envelope
from common.testing.containers import execute, running
from common.testing.stack import IMAGE, RUNTIME

if TYPE_CHECKING:
    from common.testing.stack import Stack


def test_exec_has_its_own_streams_and_status(stack: Stack) -> None:
    with running(stack) as name:
        for status in range(10):
            result = execute(stack, name, "sh", "-c", f"echo out; echo err >&2; exit {status}")
            assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", status)


def test_exec_sees_the_same_container(stack: Stack) -> None:
    with running(stack) as name:
        execute(stack, name, "sh", "-c", "echo hello > /tmp/file")
        assert execute(stack, name, "cat", "/tmp/file").stdout == b"hello\n"  # noqa: S108 - in the container
        assert b"sleep 1000" in execute(stack, name, "ps").stdout


def test_exec_of_a_missing_program_is_an_error_and_harms_nothing(stack: Stack) -> None:
    with running(stack) as name:
        missing = execute(stack, name, "/no/such/program")
        assert missing.returncode != 0
        assert b"/no/such/program" in missing.stderr
        assert execute(stack, name, "true").returncode == 0


def test_exec_with_a_terminal(stack: Stack) -> None:
    with running(stack) as name:
        ours, theirs = pty.openpty()
        command = stack.ctr_argv("task", "exec", "-t", "--exec-id", "tty", name, "sh", "-c", "tty; stty size")
        with subprocess.Popen(command, env=stack.environment, stdin=theirs, stdout=theirs, stderr=theirs) as ctr:
            os.close(theirs)
            seen = b""
            while b"/dev/pts/" not in seen:
                seen += os.read(ours, 4096)
            assert ctr.wait(60) == 0
        os.close(ours)


def test_listing_and_killing(stack: Stack) -> None:
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    command = stack.ctr_argv("run", "--rm", "--runtime", RUNTIME, IMAGE, "listed", "sh", "-c", script)
    with subprocess.Popen(command, env=stack.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as ctr:
        assert ctr.stdout is not None
        assert ctr.stdout.readline() == b"ready\n"
        listed = stack.ctr("task", "ls").stdout.decode()
        assert [line.split()[2] for line in listed.splitlines() if line.startswith("listed")] == ["RUNNING"]
        assert len(stack.ctr("task", "ps", "listed", check=True).stdout.splitlines()) == 2
        stack.ctr("task", "kill", "-s", "SIGTERM", "listed", check=True)
        assert ctr.wait(60) == 7


def test_errors_read_as_with_runc(stack: Stack) -> None:
    with running(stack) as name:
        deleted = stack.ctr("task", "delete", name)
        assert deleted.returncode == 1
        assert b"task must be stopped before deletion: running: failed precondition" in deleted.stderr
        unknown = stack.ctr("task", "kill", "--exec-id", "nope", name)
        assert b"not found" in unknown.stderr
        paused = stack.ctr("task", "checkpoint", name)
        assert paused.returncode == 1


class SubscribeRequest(Message):
    """``containerd.services.events.v1.SubscribeRequest``."""

    filters: list[str] = repeated(string(1))


def test_events_come_in_containerds_order(stack: Stack) -> None:
    with grpc.insecure_channel(f"unix://{stack.socket}") as channel:
        subscribe = channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            request_serializer=Message.encode,
            response_deserializer=Envelope.decode,
        )
        events = subscribe(SubscribeRequest(filters=['topic~="/tasks/"']), timeout=120)
        with running(stack) as name:
            execute(stack, name, "true")
            stack.ctr("task", "kill", "-s", "SIGKILL", name, check=True)
            topics: list[str] = []
            while topics.count("/tasks/exit") < 2:
                topics.append(next(events).topic)
            stack.ctr("task", "rm", name)
            topics.append(next(events).topic)
        events.cancel()
    assert topics == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ]
