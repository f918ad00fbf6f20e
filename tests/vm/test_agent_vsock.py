"""The agent in a guest that has a vsock device and no virtio-serial: a hybrid socket on the host's side."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from common.channel import AGENT_VSOCK_PORT, RESERVED_PARAMETER
from common.protocols.agent import HEALTH_SERVICE, SERVING, CheckRequest, HealthCheckResponse
from common.testing.guest_sandbox import GuestSandbox
from common.testing.guest_vm import GuestVm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest.image import Image


@pytest.fixture(scope="module")
def sandbox(image: Image) -> Iterator[GuestSandbox]:
    with GuestSandbox(image.vmlinux, image.initrd, has_vsock=True) as running:
        yield running


def test_who_connects_before_the_guest_is_up_is_not_refused(sandbox: GuestSandbox) -> None:
    """The fixture has connected at once."""
    assert sandbox.vm.vsock is not None
    assert sandbox.vm.vsock.refused == 0


def test_a_port_that_nobody_serves_is_refused(sandbox: GuestSandbox) -> None:
    with pytest.raises(ConnectionRefusedError):
        sandbox.vm._dial(AGENT_VSOCK_PORT + 1)


def test_streams_of_a_container_and_its_execs(sandbox: GuestSandbox) -> None:
    task = sandbox.run("sh", "-c", "cat; echo wrong >&2; sleep 1000", stdin=True)
    assert task.stdin is not None
    assert task.stderr is not None
    task.stdin.write(b"right\n")
    task.stdin.write(b"")
    assert task.stdout.read_until(b"right\n") == b"right\n"
    assert task.stderr.read_until(b"wrong\n") == b"wrong\n"
    other = sandbox.exec(task, "echo", "also")
    assert other.stdout.read_all() == b"also\n"
    assert other.wait() == 0
    task.kill()
    task.remove()


def test_much_output_is_intact(sandbox: GuestSandbox) -> None:
    script = "head -c 3000000 /dev/urandom > /tmp/x; sha256sum /tmp/x >&2; cat /tmp/x"
    task = sandbox.run("sh", "-c", script)
    assert task.stderr is not None
    digest = hashlib.sha256(task.stdout.read_all()).hexdigest()
    assert task.stderr.read_all().split()[0].decode() == digest
    assert task.wait() == 0
    task.remove()


def test_a_host_that_closes_a_stream_lets_its_writer_know(sandbox: GuestSandbox) -> None:
    task = sandbox.run("sh", "-c", "yes; echo $? >&2; exit 7")
    assert task.stderr is not None
    task.stdout.read_until(b"y\n")
    task.stdout.close()
    assert task.stderr.read_all() == b"141\n", "SIGPIPE"
    assert task.wait() == 7
    task.remove()


def test_conversations_are_independent(sandbox: GuestSandbox) -> None:
    with sandbox.vm.connect() as first, sandbox.vm.connect() as second:
        for agent in (first, second, sandbox.agent):
            reply = agent.call(HEALTH_SERVICE, "Check", CheckRequest(), HealthCheckResponse)
            assert reply.status == SERVING


def test_a_guest_needs_no_console(image: Image) -> None:
    no_serial_port = "8250.nr_uarts=0"
    with GuestVm(image.vmlinux, image.initrd, has_vsock=True, parameters=no_serial_port) as vm, vm.connect() as agent:
        assert agent.call(HEALTH_SERVICE, "Check", CheckRequest(), HealthCheckResponse).status == SERVING
        assert "agent is up" not in vm.console()


def test_only_root_of_the_host_is_listened_to_if_the_command_line_says_so(image: Image) -> None:
    """The device's first client gets a port that anybody can have, the second one of root's."""
    with GuestVm(image.vmlinux, image.initrd, has_vsock=True, parameters=RESERVED_PARAMETER) as vm:
        assert vm.vsock is not None
        refused = vm.connect()
        with refused, pytest.raises((EOFError, ConnectionError)):
            refused.call(HEALTH_SERVICE, "Check", CheckRequest(), HealthCheckResponse)
        vm.vsock.next_port = 1023
        with vm.connect() as agent:
            assert agent.call(HEALTH_SERVICE, "Check", CheckRequest(), HealthCheckResponse).status == SERVING
