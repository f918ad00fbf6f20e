"""An agent that has no stream ports, as upstream's: standard streams are calls to it."""

from __future__ import annotations

import hashlib

from common.testing.fake_channel import FakeHybrid
from common.testing.shim_client import KILLED, Reader, Shim, carry_streams, refusal, started
from common.testing.shim_stand import ShimStand, stand_test


async def begun(stand: ShimStand) -> Shim:
    stand.vms.channel = FakeHybrid
    stand.vms.features = []
    return await started(stand)


def methods(stand: ShimStand) -> list[str]:
    assert stand.vms.guest is not None
    return stand.vms.guest.methods()


@stand_test
async def test_streams_of_a_container(stand: ShimStand) -> None:
    shim = await begun(stand)
    await carry_streams(shim, status=3)


@stand_test
async def test_the_end_is_asked_for_after_the_output(stand: ShimStand) -> None:
    """Upstream's agent closes a process's pipes when it answers WaitProcess."""
    shim = await begun(stand)
    out = Reader(stand, "out")
    await shim.create("sh", "-c", "head -c 1000000 /dev/zero", stdout=out.path)
    await shim.start()
    received = await out.all()
    assert hashlib.sha256(received).digest() == hashlib.sha256(bytes(1_000_000)).digest()
    assert await shim.wait() == 0
    asked = methods(stand)
    assert max(n for n, method in enumerate(asked) if method == "ReadStdout") < asked.index("WaitProcess")


@stand_test
async def test_output_that_nobody_wants_stops_no_process(stand: ShimStand) -> None:
    shim = await begun(stand)
    await shim.create("sh", "-c", "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; cat")
    await shim.start()
    assert await shim.wait() == 0, "standard input, which it has not, is at its end"
    assert "CloseStdin" in methods(stand)


@stand_test
async def test_execs_and_a_kill(stand: ShimStand) -> None:
    shim = await begun(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    out = Reader(stand, "out")
    await shim.exec("e1", "echo", "said", stdout=out.path)
    await shim.start("e1")
    assert await out.all() == b"said\n"
    assert await shim.wait("e1") == 0
    await shim.exec("e2", "/no/such/program", stdout=Reader(stand, "none").path)
    assert "not found" in str(await refusal(shim.start("e2")))
    await shim.kill(9, is_all=True)
    assert await shim.wait() == KILLED


@stand_test
async def test_a_vm_that_ends(stand: ShimStand) -> None:
    shim = await begun(stand)
    out = Reader(stand, "out")
    await shim.create("sleep", "1000", stdout=out.path)
    await shim.start()
    await stand.vms.end_vm()
    assert await shim.wait() == KILLED
    assert await out.all() == b""


@stand_test
async def test_a_container_that_was_never_started_can_be_killed(stand: ShimStand) -> None:
    shim = await begun(stand)
    await shim.create("sleep", "1000", stdout=Reader(stand, "out").path)
    await shim.kill(9)
    assert await shim.wait() == KILLED
