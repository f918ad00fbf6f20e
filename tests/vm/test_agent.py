"""The agent in a real VM: what happens to processes, streams and requests."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import status
from common.channel import NO_STREAM
from common.protocols import oci
from common.protocols.agent import (
    AGENT_SERVICE,
    HEALTH_SERVICE,
    SHARE_MOUNT_POINT,
    CheckRequest,
    ContainerRequest,
    CreateContainerRequest,
    Empty,
    ExecProcessRequest,
    GuestDetailsRequest,
    GuestDetailsResponse,
    HealthCheckResponse,
    RemoveContainerRequest,
    SignalProcessRequest,
    TtyWinResizeRequest,
    WaitProcessRequest,
    WaitProcessResponse,
)
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import GuestSandbox, Task, container_spec, create_sandbox_request
from common.ttrpc import frames
from guest.image import Image, build

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOB_SIZE = 16 << 20
_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def image() -> Image:
    return build(Path(os.environ.get("PYKATA_GUEST_DIR") or _REPOSITORY / "build" / "guest"), print)


@pytest.fixture(scope="module")
def sandbox(image: Image) -> Iterator[GuestSandbox]:
    with GuestSandbox(image.vmlinux, image.initrd) as running:
        yield running


@pytest.fixture
def idle(sandbox: GuestSandbox) -> Iterator[Task]:
    """A container that does nothing until it is killed."""
    task = sandbox.run("sleep", "100000")
    yield task
    task.kill()


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_exit_code_is_the_process_s(sandbox: GuestSandbox, code: int) -> None:
    task = sandbox.run("sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert task.stdout.read_all() == b"out\n"
    assert task.stderr
    assert task.stderr.read_all() == b"err\n"
    assert task.wait() == code


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_is_128_and_its_number(sandbox: GuestSandbox, idle: Task, number: int, expected: int) -> None:
    task = sandbox.exec(idle, "sleep", "100000")
    task.signal(number)
    assert task.wait() == expected


def test_signal_to_the_first_process_leaves_the_signal_of_execs_alone(sandbox: GuestSandbox, idle: Task) -> None:
    task = sandbox.exec(idle, "sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.1; done")
    task.stdout.read_until(b"ready")
    idle.signal(signal.SIGUSR1)  # pid 1 of its namespace, which has no handler: ignored
    task.signal(signal.SIGUSR1)
    assert task.wait() == 7


def test_signal_to_all_reaches_every_process(sandbox: GuestSandbox) -> None:
    script = "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.1; done"
    first = sandbox.run("sh", "-c", script)
    second = sandbox.exec(first, "sh", "-c", script)
    for task in (first, second):
        task.stdout.read_until(b"ready")
    first.signal(signal.SIGUSR1, to_all=True)
    assert first.stdout.read_all() == b"got\n"
    # The end of the first process, pid 1 of their namespace, may kill the second before its trap has run.
    assert (first.wait(), second.wait() in (5, 137)) == (5, True)


def test_kill_to_all_ends_every_process(sandbox: GuestSandbox) -> None:
    first = sandbox.run("sh", "-c", "trap '' TERM; sleep 100000 & wait")
    second = sandbox.exec(first, "sleep", "100000")
    first.signal(signal.SIGKILL, to_all=True)
    assert (first.wait(), second.wait()) == (137, 137)


def test_a_process_that_ended_is_not_signalled(sandbox: GuestSandbox) -> None:
    task = sandbox.run("true")
    assert task.wait() == 0
    for to_all in (False, True):
        with pytest.raises(AgentError, match="process already finished") as refused:
            task.signal(signal.SIGTERM, to_all=to_all)
        assert refused.value.code == status.NOT_FOUND


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_a_created_container_that_is_killed_counts_as_ended(sandbox: GuestSandbox, number: int, expected: int) -> None:
    task = sandbox.create("true", stdin=True)
    task.signal(number, to_all=True)
    assert task.stdout.read_all() == b""
    with pytest.raises(AgentError, match="cannot start a process that is exited"):
        task.start()
    assert task.wait() == expected


def test_binary_data_passes_both_ways_and_ends(sandbox: GuestSandbox) -> None:
    blob = os.urandom(_BLOB_SIZE)
    task = sandbox.run("cat", stdin=True)
    stdin = task.stdin
    assert stdin

    def feed() -> None:
        for at in range(0, len(blob), 1 << 15):
            stdin.write(blob[at : at + (1 << 15)])
        stdin.write(b"")

    with ThreadPoolExecutor(1) as pool:
        fed = pool.submit(feed)
        assert hashlib.sha256(task.stdout.read_all()).digest() == hashlib.sha256(blob).digest()
        fed.result()
    assert task.wait() == 0


def test_output_that_nobody_reads_blocks_its_own_process_only(sandbox: GuestSandbox) -> None:
    blob = os.urandom(_BLOB_SIZE)
    (sandbox.rootfs / "blob").write_bytes(blob)
    slow = sandbox.run("cat", "/blob")
    waiting = slow.begin_wait()
    for _ in range(3):
        other = sandbox.exec(slow, "echo", "alive")
        assert other.stdout.read_all() == b"alive\n"
        assert other.wait() == 0
    assert not sandbox.agent.is_answered(waiting)
    assert slow.stdout.read_all() == blob
    assert sandbox.agent.finish(waiting, WaitProcessResponse).status == 0
    slow.close()


def test_input_that_nobody_reads_is_dropped_by_the_ports_next_use(sandbox: GuestSandbox, idle: Task) -> None:
    deaf = sandbox.exec(idle, "true", stdin=True)
    assert deaf.stdin
    deaf.stdin.write(b"x" * 5000)
    assert deaf.wait() == 0
    hearing = sandbox.exec(idle, "cat", stdin=True)
    assert hearing.stdin
    hearing.stdin.write(b"mine")
    hearing.stdin.write(b"")
    assert (hearing.stdout.read_all(), hearing.wait()) == (b"mine", 0)


def test_half_a_frame_of_an_earlier_use_is_dropped(sandbox: GuestSandbox, idle: Task) -> None:
    deaf = sandbox.exec(idle, "true", stdin=True)
    assert deaf.stdin
    whole = (deaf.stdin.number).to_bytes(4, "big") + (60000).to_bytes(4, "big")
    deaf.stdin.socket.sendall(whole + b"x" * 10)
    assert deaf.wait() == 0
    assert sandbox.exec(idle, "true").wait() == 0  # by now the agent has been told that the host's end was closed
    hearing = sandbox.exec(idle, "cat", stdin=True)
    assert hearing.stdin
    hearing.stdin.write(b"mine")
    hearing.stdin.write(b"")
    assert (hearing.stdout.read_all(), hearing.wait()) == (b"mine", 0)


def test_a_background_process_does_not_keep_the_streams(sandbox: GuestSandbox, idle: Task) -> None:
    task = sandbox.exec(idle, "sh", "-c", "sleep 100000 & echo done")
    assert (task.stdout.read_all(), task.wait()) == (b"done\n", 0)


def test_streams_without_a_port_are_null(sandbox: GuestSandbox, idle: Task) -> None:
    process = oci.Process(args=["sh", "-c", "cat; echo x; exit 4"], env=["PATH=/bin"], cwd="/", user=oci.User())
    none = NO_STREAM
    request = ExecProcessRequest(
        container_id=idle.container_id,
        exec_id="silent",
        process=process,
        stdin_port=none,
        stdout_port=none,
        stderr_port=none,
    )
    sandbox.agent.ask("ExecProcess", request, Empty)
    waiting = WaitProcessRequest(container_id=idle.container_id, exec_id="silent")
    assert sandbox.agent.ask("WaitProcess", waiting, WaitProcessResponse).status == 4


def test_a_terminal_echoes_resizes_and_ends(sandbox: GuestSandbox) -> None:
    task = sandbox.create("sh", terminal=True)
    resize(sandbox, task, 24, 80)
    task.start()
    stdin = task.stdin
    assert stdin
    stdin.write(b"stty size\n")
    assert b"24 80" in task.stdout.read_until(b"24 80")
    resize(sandbox, task, 50, 132)
    stdin.write(b"stty size\n")
    assert b"50 132" in task.stdout.read_until(b"50 132")
    stdin.write(b"tty; exit 9\n")
    assert b"/dev/" in task.stdout.read_all()
    assert task.wait() == 9


def test_exec_with_a_terminal(sandbox: GuestSandbox, idle: Task) -> None:
    task = sandbox.exec(idle, "sh", "-c", "read line; echo got $line; tty", terminal=True)
    assert task.stdin
    task.stdin.write(b"hello\n")
    output = task.stdout.read_all()
    assert b"got hello" in output
    assert b"/dev/" in output
    assert task.wait() == 0


def test_resizing_what_has_no_terminal_is_refused(sandbox: GuestSandbox, idle: Task) -> None:
    with pytest.raises(AgentError, match="process has no terminal"):
        resize(sandbox, idle, 24, 80)


def test_twenty_execs_in_a_row(sandbox: GuestSandbox, idle: Task) -> None:
    for code in range(20):
        task = sandbox.exec(idle, "sh", "-c", f"echo {code}; exit {code}")
        assert (task.stdout.read_all(), task.wait()) == (f"{code}\n".encode(), code)


def test_a_missing_executable_is_named_and_every_stream_ends(sandbox: GuestSandbox, idle: Task) -> None:
    task = sandbox.create("no-such-program", stdin=True)
    with pytest.raises(AgentError, match=r"`no-such-program` not found in \$PATH: no such file or directory"):
        task.start()
    assert task.stderr
    assert (task.stdout.read_all(), task.stderr.read_all()) == (b"", b""), "the reason is in the answer alone"
    assert task.wait() == 255
    with pytest.raises(AgentError, match=r"`no-such-program` not found in \$PATH: no such file or directory"):
        sandbox.exec(idle, "no-such-program")


@pytest.mark.parametrize("command", ["/etc", "/bin", "/etc/passwd"])
def test_what_cannot_be_executed_is_denied(sandbox: GuestSandbox, idle: Task, command: str) -> None:
    """As runc says it; with these words Docker ends with 126."""
    (sandbox.rootfs / "etc").mkdir(exist_ok=True)
    (sandbox.rootfs / "etc" / "passwd").write_text("")
    task = sandbox.create(command)
    with pytest.raises(AgentError, match="open executable: permission denied"):
        task.start()
    assert task.stderr
    assert (task.stdout.read_all(), task.stderr.read_all()) == (b"", b"")
    assert task.wait() == 255
    with pytest.raises(AgentError, match="open executable: permission denied"):
        sandbox.exec(idle, command)


def test_orphans_are_reaped(sandbox: GuestSandbox) -> None:
    """The container shares the agent's pid namespace, so the agent inherits what its processes leave behind."""
    script = "(sh -c 'exit 5' &); (sleep 0.1 &); while ps -o stat | grep -q ^Z; do :; done; echo no zombies"
    task = sandbox.run("sh", "-c", script, pid="/proc/1/ns/pid")
    assert (task.stdout.read_all(), task.wait()) == (b"no zombies\n", 0)


def test_a_container_is_isolated_and_has_a_loopback(sandbox: GuestSandbox) -> None:
    script = "echo $$; hostname; ip -o link show lo | grep -o UP | head -1; cat /proc/self/cgroup; ls /sys/fs/cgroup"
    task = sandbox.run("sh", "-c", script)
    pid, hostname, loopback, cgroup = task.stdout.read_all().decode().split()
    assert (pid, hostname, loopback, cgroup) == ("1", "container", "UP", f"0::/{task.container_id}")
    assert task.wait() == 0


def test_limits_are_those_of_the_container_s_cgroup(sandbox: GuestSandbox) -> None:
    spec = container_spec(
        f"{SHARE_MOUNT_POINT}/base/rootfs",
        "sh",
        "-c",
        "cat /sys/fs/cgroup/limited/memory.max /sys/fs/cgroup/limited/cpu.max",
    )
    spec.mounts.append(oci.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=["ro"]))
    assert spec.linux
    spec.linux.resources = oci.LinuxResources(
        memory=oci.LinuxMemory(limit=64 << 20), cpu=oci.LinuxCPU(quota=50_000, period=100_000)
    )
    with closing(sandbox.vm.stream()) as stdout:
        request = CreateContainerRequest(
            container_id="limited", oci=spec, stdin_port=NO_STREAM, stdout_port=stdout.number, stderr_port=NO_STREAM
        )
        sandbox.agent.ask("CreateContainer", request, Empty)
        sandbox.agent.ask("StartContainer", ContainerRequest(container_id="limited"), Empty)
        assert stdout.read_all() == b"67108864\n50000 100000\n"


def test_a_removed_container_is_gone_and_its_id_free(sandbox: GuestSandbox) -> None:
    task = sandbox.run("sleep", "100000")
    sandbox.agent.ask("RemoveContainer", RemoveContainerRequest(container_id=task.container_id), Empty)
    with pytest.raises(AgentError, match=f"container {task.container_id} does not exist"):
        task.wait()
    task.close()


MALFORMED = {
    "no protobuf": ("CreateContainer", b"\xff" * 40, status.INVALID_ARGUMENT),
    "deeply nested": ("CreateContainer", b"\x32\x7f" * 60, status.INVALID_ARGUMENT),
    "unknown method": ("MemAgentCompactSet", b"", status.UNIMPLEMENTED),
    "unknown container": ("StartContainer", b"\x0a\x01x", status.NOT_FOUND),
    "no container": ("CreateContainer", b"", status.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_answered_and_survived(sandbox: GuestSandbox, case: str) -> None:
    method, payload, code = MALFORMED[case]
    request = frames.Request(service=AGENT_SERVICE, method=method, payload=payload).encode()
    with pytest.raises(AgentError) as refused:
        sandbox.agent.finish(sandbox.agent.send_frame(frames.REQUEST, request), Empty)
    assert refused.value.code == code
    if code == status.UNIMPLEMENTED:
        assert method in refused.value.text
    assert_alive(sandbox)


def test_frames_that_are_no_requests_are_survived(sandbox: GuestSandbox) -> None:
    sandbox.agent.send_frame(frames.DATA, b"x")
    with pytest.raises(AgentError, match="not a ttrpc request"):
        sandbox.agent.finish(sandbox.agent.send_frame(frames.REQUEST, b"\xff\xff\xff"), Empty)
    sandbox.agent.socket.sendall((frames.MAX_PAYLOAD + 1).to_bytes(4, "big") + bytes.fromhex("00000fff 01 00"))
    sandbox.agent.socket.sendall(bytes(frames.MAX_PAYLOAD + 1))
    with pytest.raises(AgentError, match="exceeds ttrpc's limit"):
        sandbox.agent.finish(0xFFF, Empty)
    assert_alive(sandbox)


@pytest.mark.parametrize(
    ("container_id", "stdout", "said"),
    [
        ("../x", 0, "'../x' is not a container id"),
        ("x", 0x1FF, "names port 255"),
        ("x", 0x11C, "has no port for stream 0x11c"),
    ],
)
def test_what_a_container_cannot_be_is_refused(
    sandbox: GuestSandbox, container_id: str, stdout: int, said: str
) -> None:
    request = CreateContainerRequest(container_id=container_id, oci=container_spec("/x", "true"), stdout_port=stdout)
    with pytest.raises(AgentError, match=said):
        sandbox.agent.ask("CreateContainer", request, Empty)


def test_a_signal_that_is_none_is_refused(sandbox: GuestSandbox, idle: Task) -> None:
    request = SignalProcessRequest(container_id=idle.container_id, signal=65)
    with pytest.raises(AgentError, match="65 is not a signal"):
        sandbox.agent.ask("SignalProcess", request, Empty)


def test_guest_details(sandbox: GuestSandbox) -> None:
    details = sandbox.agent.ask("GetGuestDetails", GuestDetailsRequest(mem_block_size=True), GuestDetailsResponse)
    assert details.agent_details
    assert details.agent_details.storage_handlers == [
        "virtio-fs",
        "blk",
        "scsi",
        "mmioblk",
        "nvdimm",
        "ephemeral",
        "local",
        "overlayfs",
    ]
    assert details.agent_details.init_daemon
    assert details.mem_block_size_bytes % (1 << 20) == 0


def test_a_reconnection_in_the_middle_of_a_request(sandbox: GuestSandbox) -> None:
    request = frames.encode(1, frames.REQUEST, b"x" * 6000)
    for cut in (3, 10, 11, 4500):
        sandbox.agent.socket.sendall(request[:cut])
        sandbox.reconnect()
        assert_alive(sandbox)


def test_a_reconnection_in_the_middle_of_answers(sandbox: GuestSandbox) -> None:
    for _ in range(200):
        sandbox.agent.begin(HEALTH_SERVICE, "Version", CheckRequest())
    sandbox.reconnect()
    assert_alive(sandbox)


def test_waiting_goes_on_in_the_next_conversation(sandbox: GuestSandbox) -> None:
    task = sandbox.run("sh", "-c", "read line; exit 6", stdin=True)
    task.begin_wait()
    sandbox.reconnect()
    waiting = task.begin_wait()
    assert task.stdin
    task.stdin.write(b"")
    assert sandbox.agent.finish(waiting, WaitProcessResponse).status == 6
    task.close()


def test_failed_calls_are_logged_with_the_request_id(sandbox: GuestSandbox) -> None:
    with pytest.raises(AgentError, match="container nobody does not exist"):
        sandbox.agent.call(
            AGENT_SERVICE, "WaitProcess", WaitProcessRequest(container_id="nobody"), Empty, request_id="abc123"
        )
    assert '"request": "abc123"' in sandbox.vm.console()


def test_what_was_done_is_logged_with_the_request_id(sandbox: GuestSandbox) -> None:
    task = sandbox.create("true")
    request = ContainerRequest(container_id=task.container_id)
    sandbox.agent.call(AGENT_SERVICE, "StartContainer", request, Empty, request_id="def456")
    assert task.wait() == 0
    (line,) = (line for line in sandbox.vm.console().splitlines() if "def456" in line)
    logged = json.loads(line)
    assert (logged["method"], logged["container"]) == ("StartContainer", task.container_id)


def test_a_share_that_never_comes_is_an_error(sandbox: GuestSandbox) -> None:
    with pytest.raises(AgentError, match="no virtio-fs device 'absent' appeared within 10 s"):
        sandbox.agent.ask("CreateSandbox", create_sandbox_request("absent"), Empty)


def test_destroying_the_sandbox_ends_everything(image: Image) -> None:
    with GuestSandbox(image.vmlinux, image.initrd) as sandbox:
        task = sandbox.run("sh", "-c", "echo written > /file; echo ready; sleep 100000")
        task.stdout.read_until(b"ready")
        sandbox.agent.ask("DestroySandbox", Empty(), Empty)
        assert task.wait() == 137
        assert (sandbox.rootfs / "file").read_text() == "written\n"


def resize(sandbox: GuestSandbox, task: Task, rows: int, columns: int) -> None:
    request = TtyWinResizeRequest(container_id=task.container_id, exec_id=task.exec_id, row=rows, column=columns)
    sandbox.agent.ask("TtyWinResize", request, Empty)


def assert_alive(sandbox: GuestSandbox) -> None:
    answer = sandbox.agent.call(HEALTH_SERVICE, "Check", CheckRequest(), HealthCheckResponse)
    assert answer.status == 1
