"""The shim as containerd drives it: a container's life, from `start` to `delete`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from common.errors import AlreadyExistsError, KataError, NotFoundError, StateError, UnsupportedError
from common.protocols import task
from common.testing.shim_client import KILLED, Reader, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


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
    records = [json.loads(line) for line in stand.log().splitlines()]
    spent = next(record["seconds"] for record in records if record["event"] == "sandbox stopped")
    assert list(spent) == ["ending the guest", "destroying the VM", "unmounting"]


@stand_test
async def test_the_vm_boots_before_create(stand: ShimStand) -> None:
    await started(stand)
    await stand.devices.has_confirmed.wait()
    assert stand.vms.guest is not None
    assert stand.vms.guest.methods() == ["Check", "GetGuestDetails", "CreateSandbox"]


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
async def test_events_wait_for_containerd(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await stand.containerd.wait_topics(1)
    async with stand.containerd_away():
        await shim.start()
        await shim.kill(9)
        await shim.wait()
    assert await stand.containerd.wait_topics(3) == ["/tasks/create", "/tasks/start", "/tasks/exit"]


@stand_test
async def test_containers_of_pods_are_refused(stand: ShimStand) -> None:
    config = json.loads((stand.bundle / "config.json").read_text())
    config["annotations"] = {"io.kubernetes.cri.container-type": "sandbox"}
    (stand.bundle / "config.json").write_text(json.dumps(config))
    refused = await stand.run("start")
    assert refused.returncode == 1
    assert b"pods are not supported yet" in refused.stderr
    assert not stand.sandbox_dir.exists()


@stand_test
async def test_a_shim_that_cannot_go_on_record_says_why(stand: ShimStand) -> None:
    """As on a run directory that is full; here no file may grow."""
    program = stand.PROGRAM
    limited = stand.root / "limited"
    limited.write_text(f'#!/bin/sh\nexec prlimit --fsize=0 {program} "$@"\n')
    limited.chmod(0o700)
    stand.PROGRAM = limited
    done = await stand.run("start")
    stand.PROGRAM = program
    assert done.returncode == 1
    assert f"the shim of sandbox {stand.id} ended before it began: [Errno 27] File too large" in done.stderr.decode()
    assert stand.leftovers() == []
