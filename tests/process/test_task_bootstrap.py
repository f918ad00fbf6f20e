"""How containerd, old and new, begins with the shim, and both versions of the Task API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import NotFoundError, UnsupportedError
from common.protocols import task
from common.protocols.bootstrap import LOG_DEBUG, BootstrapParams, BootstrapResult, Extension
from common.testing.shim_client import started
from common.testing.shim_stand import NAMESPACE, stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


def params(stand: ShimStand, **fields: str) -> BootstrapParams:
    """Return what containerd 2.3 writes to standard input of ``start``."""
    options = task.RuntimeOptions(config_path=str(stand.config)).encode()
    extension = Extension(value=task.Any(type_url=task.RuntimeOptions.TYPE_URL, value=options))
    return BootstrapParams(
        instance_id=stand.id,
        namespace=NAMESPACE,
        log_level=LOG_DEBUG,
        containerd_version="v2.3.4",
        extensions=[extension],
        socket_dir=fields.get("socket_dir", ""),
    )


async def state(stand: ShimStand, service: str) -> None:
    """Ask for the state of a container that does not exist, of a certain version of the API."""
    client = await stand.connect()
    with pytest.raises(NotFoundError, match=f"container {stand.id}"):
        await client.call(service, "State", task.StateRequest(id=stand.id), task.StateResponse, timeout_s=60)


@stand_test
async def test_an_old_containerd_gets_the_address_as_text(stand: ShimStand) -> None:
    done = await stand.run("start")
    assert done.stdout.decode() == f"unix://{stand.socket_path}\n"
    await state(stand, task.SERVICE)


@stand_test
async def test_a_new_containerd_gets_the_third_version(stand: ShimStand) -> None:
    done = await stand.run("start", options=params(stand).encode())
    assert done.returncode == 0, done.stderr
    result = BootstrapResult.decode(done.stdout)
    assert (result.version, result.address, result.protocol) == (3, f"unix://{stand.socket_path}", "ttrpc")
    await stand.vms.has_vm.wait()  # with the configuration that is among the parameters
    for service in (task.SERVICE_V3, task.SERVICE):
        await state(stand, service)


@stand_test
async def test_sockets_are_where_containerd_wants_them_and_delete_finds_them(stand: ShimStand) -> None:
    directory = stand.root / "s"
    done = await stand.run("start", options=params(stand, socket_dir=str(directory)).encode())
    assert done.returncode == 0, done.stderr
    assert stand.socket_path.parent == directory
    await stand.kill_shim()
    assert stand.socket_path.exists()
    await stand.delete()
    assert not stand.socket_path.exists()


@stand_test
async def test_input_that_is_neither_is_refused(stand: ShimStand) -> None:
    cut = params(stand).encode()[:-1]
    done = await stand.run("start", options=cut)
    assert done.returncode == 1
    assert b"bootstrap parameters on standard input are malformed" in done.stderr
    done = await stand.run("start", options=bytes((1 << 20) + 1))
    assert b"standard input of start exceeds 1048576 bytes" in done.stderr
    assert not stand.sandbox_dir.exists()


@stand_test
async def test_another_service_is_not_implemented_as_containerd_wants_to_hear_it(stand: ShimStand) -> None:
    shim = await started(stand)
    with pytest.raises(UnsupportedError, match=r"of service containerd\.task\.v4\.Task is not implemented"):
        await shim.client.call("containerd.task.v4.Task", "State", task.StateRequest(), task.Empty, timeout_s=60)
