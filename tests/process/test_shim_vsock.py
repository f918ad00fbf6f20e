"""A sandbox whose guest is reached by hybrid vsock: the shim above the channel is the same."""

from __future__ import annotations

from common.channel import AGENT_VSOCK_PORT, STREAM_VSOCK_PORT
from common.testing.fake_channel import FakeHybrid
from common.testing.shim_client import KILLED, Reader, carry_streams, refusal, started
from common.testing.shim_stand import ShimStand, stand_test


def hybrid(stand: ShimStand) -> FakeHybrid:
    assert stand.vms.guest is not None
    assert isinstance(stand.vms.guest.channel, FakeHybrid)
    return stand.vms.guest.channel


@stand_test
async def test_the_agent_is_asked_again_until_it_listens(stand: ShimStand) -> None:
    stand.vms.channel = FakeHybrid
    shim = await started(stand)
    await shim.create("true")
    await shim.start()
    assert await shim.wait() == 0
    assert hybrid(stand).asked == [AGENT_VSOCK_PORT] * 3


@stand_test
async def test_every_stream_is_a_connection(stand: ShimStand) -> None:
    stand.vms.channel = FakeHybrid
    shim = await started(stand)
    await carry_streams(shim, status=0)
    assert hybrid(stand).asked.count(STREAM_VSOCK_PORT) == 2


@stand_test
async def test_there_is_no_limit_of_ports(stand: ShimStand) -> None:
    """virtio-serial would have two processes at a time here, since its fake has four ports."""
    stand.vms.channel = FakeHybrid
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    readers = [(Reader(stand, f"out{n}"), Reader(stand, f"err{n}")) for n in range(8)]
    for number, (out, err) in enumerate(readers):
        await shim.exec(f"e{number}", "sleep", "1000", stdout=out.path, stderr=err.path)
        await shim.start(f"e{number}")
    await shim.kill(9, is_all=True)
    assert await shim.wait() == KILLED
    assert [await reader.all() for pair in readers for reader in pair] == [b""] * 16


@stand_test
async def test_a_vm_that_ends_while_the_guest_is_waited_for(stand: ShimStand) -> None:
    stand.vms.channel = FakeHybrid
    stand.vms.is_guest_silent = True
    shim = await started(stand)
    creating = stand.spawn(refusal(shim.create("true")))
    await stand.vms.has_vm.wait()
    await hybrid(stand).has_hello.wait()
    await stand.vms.end_vm()
    assert "the guest ended before its agent answered" in str(await creating)
