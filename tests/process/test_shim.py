"""The shim as containerd drives it: the real program and process, between fakes of all that it talks to."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING, ParamSpec

import pytest

from common.errors import (
    AlreadyExistsError,
    GuestError,
    HypervisorError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
)
from common.protocols import agent, task
from common.testing.fake_guest import Refusal
from common.testing.shim_stand import ShimStand

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.ttrpc.client import TtrpcClient

P = ParamSpec("P")

KILLED = 137


def stand_test(test: Callable[[ShimStand], Awaitable[None]]) -> Callable[[], None]:
    """Run an asynchronous test in a stand of its own, and look for what it left behind."""

    async def run() -> None:
        async with asyncio.timeout(120), ShimStand() as stand:
            await test(stand)

    @functools.wraps(test)
    def wrapper() -> None:
        asyncio.run(run())

    del wrapper.__wrapped__  # pytest would take the parameter for a fixture
    return wrapper


class Shim:
    """The Task API of a stand's shim."""

    def __init__(self, stand: ShimStand, client: TtrpcClient) -> None:
        self.stand = stand
        self.client = client

    async def create(self, *args: str, stdin: str = "", stdout: str = "", stderr: str = "") -> int:
        request = self.stand.create_request(*args, stdin=stdin, stdout=stdout, stderr=stderr)
        return (await self.stand.call(self.client, "Create", request, task.PidResponse)).pid

    async def start(self, exec_id: str = "") -> int:
        return (await self.stand.call(self.client, "Start", self.name(exec_id), task.PidResponse)).pid

    async def state(self, exec_id: str = "") -> task.StateResponse:
        return await self.stand.call(self.client, "State", self.name(exec_id), task.StateResponse)

    async def wait(self, exec_id: str = "") -> int:
        return (await self.stand.call(self.client, "Wait", self.name(exec_id), task.WaitResponse)).exit_status

    async def exec(self, exec_id: str, *args: str, stdin: str = "", stdout: str = "", stderr: str = "") -> None:
        spec = json.dumps({"args": list(args), "cwd": "/"}).encode()
        request = task.ExecProcessRequest(
            id=self.stand.id,
            exec_id=exec_id,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            spec=task.Any(type_url="types.containerd.io/opencontainers/runtime-spec/1/Process", value=spec),
        )
        await self.stand.call(self.client, "Exec", request, task.Empty)

    async def kill(self, signal: int, exec_id: str = "", *, is_all: bool = False) -> None:
        request = task.KillRequest(id=self.stand.id, exec_id=exec_id, signal=signal, all=is_all)
        await self.stand.call(self.client, "Kill", request, task.Empty)

    async def close_io(self, exec_id: str = "") -> None:
        request = task.CloseIORequest(id=self.stand.id, exec_id=exec_id, stdin=True)
        await self.stand.call(self.client, "CloseIO", request, task.Empty)

    async def delete(self, exec_id: str = "") -> task.DeleteResponse:
        return await self.stand.call(self.client, "Delete", self.name(exec_id), task.DeleteResponse)

    async def shutdown(self) -> None:
        await self.stand.call(self.client, "Shutdown", task.ShutdownRequest(id=self.stand.id), task.Empty)

    def name(self, exec_id: str) -> task.StateRequest:
        return task.StateRequest(id=self.stand.id, exec_id=exec_id)


async def started(stand: ShimStand) -> Shim:
    return Shim(stand, await stand.start())


async def refusal(work: Awaitable[object]) -> KataError:
    """Await something that fails; return its error."""
    with pytest.raises(KataError) as caught:
        await work
    return caught.value


class Reader:
    """Reads a FIFO as containerd's client does: it has it open before the process exists."""

    def __init__(self, stand: ShimStand, name: str) -> None:
        self.path = stand.fifo(name)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._data = bytearray()
        self._has_ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._take)

    async def all(self) -> bytes:
        """Return everything, once it has ended."""
        await self._has_ended.wait()
        return bytes(self._data)

    def _take(self) -> None:
        data = os.read(self._fd, 65536)
        self._data += data
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._has_ended.set()


@stand_test
async def test_a_container_lives_and_nothing_is_left(stand: ShimStand) -> None:
    shim = await started(stand)
    out = Reader(stand, "out")
    pid = await shim.create("sh", "-c", "echo hello; exit 3", stdout=out.path)
    assert stand.vms.process is not None
    assert pid == stand.vms.process.pid
    assert (await shim.state()).status == task.CREATED
    waiting = stand.spawn(shim.wait())
    assert await shim.start() == pid
    assert await waiting == 3
    assert await out.all() == b"hello\n"
    state = await shim.state()
    assert (state.status, state.exit_status) == (task.STOPPED, 3)
    assert state.exited_at is not None
    deleted = await shim.delete()
    assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (pid, 3, state.exited_at)
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []
    assert await stand.containerd.wait_topics(4) == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert stand.devices.calls == ["attach", "confirm"]
    assert stand.vms.calls == ["create_vm", "destroy_vm"]


@stand_test
async def test_the_vm_boots_before_create(stand: ShimStand) -> None:
    await started(stand)
    await stand.devices.has_confirmed.wait()
    assert stand.vms.guest is not None
    assert stand.vms.guest.methods() == ["Check", "CreateSandbox"]


@stand_test
async def test_one_request_id_reaches_bus_and_guest(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("true")
    assert stand.vms.guest is not None
    ids = dict(zip(stand.vms.guest.methods(), stand.vms.guest.request_ids, strict=True))
    records = [json.loads(line) for line in stand.log().splitlines()]
    created = next(record["request"] for record in records if record.get("verb") == "Create")
    assert ids["CreateContainer"] == created
    booted = next(record["request"] for record in records if record["event"] == "sandbox booted")
    assert ids["CreateSandbox"] == booted != created


@stand_test
async def test_execs_live_beside_the_container(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    out, err = Reader(stand, "out"), Reader(stand, "err")
    await shim.exec("e1", "sh", "-c", "echo out; echo err >&2; exit 7", stdout=out.path, stderr=err.path)
    assert (await shim.state("e1")).status == task.CREATED
    waiting = stand.spawn(shim.wait("e1"))
    await shim.start("e1")
    assert await waiting == 7
    assert [await out.all(), await err.all()] == [b"out\n", b"err\n"]
    state = await shim.state("e1")
    assert (state.id, state.exec_id, state.status, state.exit_status) == ("e1", "e1", task.STOPPED, 7)
    assert (await shim.delete("e1")).exit_status == 7
    with pytest.raises(NotFoundError, match="process does not exist e1"):
        await shim.state("e1")
    await shim.kill(9)
    assert await shim.wait() == KILLED
    topics = await stand.containerd.wait_topics(6)
    assert topics[2:6] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exit"]


@stand_test
async def test_exits_of_execs_are_told_before_the_containers(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    await shim.exec("e1", "sleep", "1000")
    await shim.start("e1")
    await shim.kill(9, is_all=True)
    assert await shim.wait() == KILLED
    assert await shim.wait("e1") == KILLED
    await stand.containerd.wait_topics(6)
    exits = [envelope.event for envelope in stand.containerd.envelopes if envelope.topic == "/tasks/exit"]
    assert [event.value.count(b"e1") for event in exits if event is not None] == [1, 0]


@stand_test
async def test_streams_are_binary_safe_and_end_both_ways(stand: ShimStand) -> None:
    shim = await started(stand)
    out, stdin = Reader(stand, "out"), stand.fifo("in")
    sink = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
    await shim.create("sh", "-c", "cat; echo end", stdin=stdin, stdout=out.path)
    await shim.start()
    data = os.urandom(3 << 20)
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(sink, left) :]
        except BlockingIOError:
            await asyncio.sleep(0)
    os.close(sink)
    await shim.close_io()
    received = await out.all()
    assert hashlib.sha256(received).digest() == hashlib.sha256(data + b"end\n").digest()
    assert await shim.wait() == 0


@stand_test
async def test_close_io_before_start_ends_standard_input(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("cat", stdin=stand.fifo("in"))
    await shim.close_io()
    await shim.start()
    assert await shim.wait() == 0


@stand_test
async def test_stream_ports_are_used_again_and_run_out(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(6):
        out = Reader(stand, f"out{number}")
        await shim.exec(f"e{number}", "echo", str(number), stdout=out.path)
        await shim.start(f"e{number}")
        assert await out.all() == f"{number}\n".encode()
        await shim.wait(f"e{number}")
        await shim.delete(f"e{number}")
    for number in range(2):
        await shim.exec(f"held{number}", "cat", stdout=stand.fifo(f"o{number}"), stderr=stand.fifo(f"e{number}"),
                        stdin=stand.fifo(f"i{number}"))  # fmt: skip
        await shim.start(f"held{number}")
    await shim.exec("extra", "true", stdout=stand.fifo("o2"))
    with pytest.raises(KataError, match=r"all 4 stream ports of the VM are in use \(a process takes one"):
        await shim.start("extra")
    assert (await shim.state("extra")).status == task.STOPPED


@stand_test
async def test_states_refuse_as_runc_does(stand: ShimStand) -> None:
    shim = await started(stand)
    with pytest.raises(NotFoundError, match=f"container {stand.id}"):
        await shim.state()
    await shim.create("sleep", "1000")
    with pytest.raises(AlreadyExistsError, match=f"id {stand.id}"):
        await shim.create("true")
    await shim.exec("e1", "true")
    with pytest.raises(AlreadyExistsError, match="id e1"):
        await shim.exec("e1", "true")
    with pytest.raises(StateError, match="process not created"):
        await shim.kill(9, "e1")
    with pytest.raises(StateError, match="is created"):
        await shim.start("e1")
    await shim.start()
    with pytest.raises(KataError, match="cannot start a running process"):
        await shim.start()
    with pytest.raises(KataError, match="cannot delete a running process"):
        await shim.delete()
    with pytest.raises(UnsupportedError, match="Pause"):
        await stand.call(shim.client, "Pause", task.IdRequest(id=stand.id), task.Empty)
    with pytest.raises(UnsupportedError, match="Frobnicate"):
        await stand.call(shim.client, "Frobnicate", task.IdRequest(id=stand.id), task.Empty)
    await shim.kill(9)
    await shim.wait()
    with pytest.raises(NotFoundError, match="process already finished"):
        await shim.kill(9)
    with pytest.raises(StateError, match="cannot exec in a stopped state"):
        await shim.exec("e2", "true")


@stand_test
async def test_a_created_container_can_be_killed(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.kill(9)
    assert await shim.wait() == KILLED
    assert (await shim.delete()).exit_status == KILLED


@stand_test
async def test_a_created_container_can_be_deleted(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.delete()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_command_that_is_missing_fails_at_start(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("no-such-command")
    with pytest.raises(KataError, match="executable file `no-such-command` not found"):
        await shim.start()
    assert (await shim.state()).status == task.STOPPED
    assert (await shim.delete()).exit_status == 255


@stand_test
async def test_execs_that_fail_cost_no_port(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(6):
        exec_id, path = f"e{number}", stand.fifo(f"out{number}")
        await shim.exec(exec_id, "no-such-command", stdout=path, stderr=path)
        with pytest.raises(KataError, match="executable file `no-such-command` not found"):
            await shim.start(exec_id)
        assert (await shim.delete(exec_id)).exit_status == 255


@stand_test
async def test_pids_and_connect_name_the_vmm(stand: ShimStand) -> None:
    shim = await started(stand)
    request = task.IdRequest(id=stand.id)
    before = await stand.call(shim.client, "Connect", request, task.ConnectResponse)
    assert (before.shim_pid, before.task_pid) == (stand.shim_pid, 0)
    pid = await shim.create("true")
    after = await stand.call(shim.client, "Connect", request, task.ConnectResponse)
    assert after.task_pid == pid
    pids = await stand.call(shim.client, "Pids", request, task.PidsResponse)
    assert [process.pid for process in pids.processes] == [pid]


@stand_test
async def test_terminals_take_one_port_and_are_resized(stand: ShimStand) -> None:
    shim = await started(stand)
    request = stand.create_request("sleep", "1000", stdin=stand.fifo("in"), stdout=stand.fifo("out"))
    request.terminal = True
    await stand.call(shim.client, "Create", request, task.PidResponse)
    await shim.start()
    size = task.ResizePtyRequest(id=stand.id, width=120, height=40)
    await stand.call(shim.client, "ResizePty", size, task.Empty)
    assert stand.vms.guest is not None
    calls = dict(stand.vms.guest.calls)
    created, resized = calls["CreateContainer"], calls["TtyWinResize"]
    assert isinstance(created, agent.CreateContainerRequest)
    assert created.stdin_port == created.stdout_port != 0
    assert created.stderr_port == 0
    assert created.oci is not None
    assert created.oci.process is not None
    assert created.oci.process.terminal
    assert isinstance(resized, agent.TtyWinResizeRequest)
    assert (resized.row, resized.column) == (40, 120)


@stand_test
async def test_host_paths_are_shared_with_the_guest(stand: ShimStand) -> None:
    shim = await started(stand)
    hosts = stand.root / "hosts"
    hosts.write_text("127.0.0.1 me\n")
    config = json.loads((stand.bundle / "config.json").read_text())
    config["mounts"] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["rbind", "ro"]},
    ]
    (stand.bundle / "config.json").write_text(json.dumps(config))
    await shim.create("sleep", "1000")
    share = stand.sandbox_dir / "share" / stand.id
    assert (share / "mounts" / "0").read_text() == "127.0.0.1 me\n"
    with pytest.raises(OSError, match="Read-only"):
        (share / "mounts" / "0").write_text("")
    with pytest.raises(OSError, match="Read-only"):
        (share / "new").touch()
    (share / "rootfs" / "new").touch()
    assert (stand.rootfs / "new").exists()


@stand_test
async def test_a_hypervisor_that_fails_is_told_at_create(stand: ShimStand) -> None:
    stand.vms.error = HypervisorError("kernel /x is no kernel", hint="build it again")
    shim = await started(stand)
    with pytest.raises(KataError, match=r"failed while starting the VM: kernel /x is no kernel \(build it again\)"):
        await shim.create("true")
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_configuration_that_is_wrong_is_told_at_create(stand: ShimStand) -> None:
    stand.config.write_text("[hypervisor.qemu\n")
    shim = await started(stand)
    with pytest.raises(KataError, match=f"{stand.config} is not valid TOML"):
        await shim.create("true")
    assert stand.vms.calls == []


@stand_test
async def test_a_guest_that_never_answers_is_told_with_its_console(stand: ShimStand) -> None:
    stand.write_config(dial_timeout=1)
    stand.vms.is_guest_silent = True
    stand.vms.console = "Kernel panic - not syncing: No working init found"
    shim = await started(stand)
    with pytest.raises(KataError) as failure:
        await shim.create("true")
    text = str(failure.value)
    remedy = f"raise agent.kata.dial_timeout in {stand.config}"
    for part in ("waiting for the guest's agent", "within 1 s", "No working init found", remedy):
        assert part in text
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_vm_that_ends_while_booting_is_told_at_once(stand: ShimStand) -> None:
    stand.vms.is_guest_silent = True
    shim = await started(stand)
    creating = stand.spawn(refusal(shim.create("true")))
    await stand.vms.has_vm.wait()
    assert stand.vms.guest is not None
    await stand.vms.guest.has_hello.wait()
    await stand.vms.end_vm()
    text = str(await creating)
    assert "failed while waiting for the guest's agent: the VM closed the agent's port" in text
    assert "the VM is ended" in text


@stand_test
async def test_a_share_that_the_guest_cannot_mount_is_aborted(stand: ShimStand) -> None:
    shim = await started(stand)
    await stand.vms.has_vm.wait()
    assert stand.vms.guest is not None
    stand.vms.guest.refusals["CreateSandbox"] = Refusal(13, "no device with that tag")
    with pytest.raises(KataError, match="sharing the file system: no device with that tag"):
        await shim.create("true")
    assert stand.devices.calls == ["attach", "abort"]


@stand_test
async def test_the_death_of_the_vmm_ends_every_process(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    await shim.exec("e1", "sleep", "1000")
    await shim.start("e1")
    await stand.vms.end_vm()
    assert list(await asyncio.gather(shim.wait(), shim.wait("e1"))) == [KILLED, KILLED]
    topics = await stand.containerd.wait_topics(6)
    assert topics[4:] == ["/tasks/exit", "/tasks/exit"]
    await shim.delete()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_the_end_works_without_the_vm_manager(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("true")
    await shim.start()
    stand.vms.destroy_error = GuestError("the manager is not well")
    await shim.wait()
    await shim.delete()
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.vms.process is not None
    await stand.vms.process.wait()
    assert stand.leftovers() == []


@stand_test
async def test_delete_cleans_up_after_a_killed_shim(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    shim_pid = stand.shim_pid
    await stand.kill_shim()
    done = await stand.delete()
    response = task.DeleteResponse.decode(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (response.pid, response.exit_status) == (shim_pid, KILLED)
    assert response.exited_at is not None
    assert stand.vms.process is not None
    await stand.vms.process.wait()
    assert stand.leftovers() == []
    again = await stand.delete()
    assert (again.returncode, task.DeleteResponse.decode(again.stdout).exit_status) == (0, KILLED)


@stand_test
async def test_a_living_shim_keeps_its_name_and_a_dead_one_does_not(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    refused = await stand.run("start")
    assert refused.returncode == 1
    assert f"{stand.id} runs already, for bundle {stand.bundle} in namespace test" in refused.stderr.decode()
    await shim.start()
    await stand.kill_shim()
    again = Shim(stand, await stand.start())
    assert await again.create("true") > 0


@stand_test
async def test_events_wait_for_containerd(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await stand.containerd.wait_topics(1)
    await stand.restart_containerd()
    await shim.start()
    await shim.kill(9)
    await shim.wait()
    assert await stand.containerd.wait_topics(3) == ["/tasks/create", "/tasks/start", "/tasks/exit"]


@stand_test
async def test_a_signal_does_not_end_the_shim(stand: ShimStand) -> None:
    shim = await started(stand)
    os.kill(stand.shim_pid, 15)
    assert await shim.create("true") > 0


@stand_test
async def test_containers_of_pods_are_refused(stand: ShimStand) -> None:
    config = json.loads((stand.bundle / "config.json").read_text())
    config["annotations"] = {"io.kubernetes.cri.container-type": "sandbox"}
    (stand.bundle / "config.json").write_text(json.dumps(config))
    refused = await stand.run("start")
    assert refused.returncode == 1
    assert b"pods are not supported yet" in refused.stderr
    assert not stand.sandbox_dir.exists()


@pytest.mark.soak
@stand_test
async def test_a_kill_ends_a_process_whose_output_nobody_reads(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("yes", stdout=stand.fifo("out"))
    await shim.start()
    await shim.kill(9)
    assert await shim.wait() == KILLED


@stand_test
async def test_input_that_a_process_leaves_behind_costs_no_port(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(5):
        stdin = stand.fifo(f"in{number}")
        sink = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
        os.write(sink, b"x" * 65536)
        await shim.exec(f"e{number}", "true", stdin=stdin)
        await shim.start(f"e{number}")
        assert await shim.wait(f"e{number}") == 0
        os.close(sink)
