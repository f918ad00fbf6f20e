"""Standard streams between FIFOs and the guest: bytes, ends, ports, terminals."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from common.channel import NO_STREAM, WINDOW
from common.errors import KataError
from common.protocols import agent, task
from common.testing.shim_client import KILLED, Reader, Shim, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


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
    assert stand.vms.guest
    calls = stand.vms.guest.calls
    (created,) = (call for _, call in calls if isinstance(call, agent.CreateContainerRequest))
    told = [call for _, call in calls if isinstance(call, agent.TakenRequest)]
    assert {call.stream for call in told} == {created.stdout_port}
    assert len(data) - WINDOW // 2 < sum(call.size for call in told) <= len(data), "the guest may go on sending pages"


@stand_test
async def test_close_io_before_start_ends_standard_input(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("cat", stdin=stand.fifo("in"))
    await shim.close_io()
    await shim.start()
    assert await shim.wait() == 0


@stand_test
async def test_stream_ports_are_used_again(stand: ShimStand) -> None:
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


async def with_every_port_taken(stand: ShimStand) -> Shim:
    """Return a shim of whose four ports two execs have two each, and an exec that is registered."""
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(2):
        await shim.exec(f"held{number}", "cat", stdout=stand.fifo(f"o{number}"), stderr=stand.fifo(f"e{number}"),
                        stdin=stand.fifo(f"i{number}"))  # fmt: skip
        await shim.start(f"held{number}")
    await shim.exec("extra", "true", stdout=stand.fifo("o2"))
    return shim


@stand_test
async def test_a_process_waits_for_stream_ports(stand: ShimStand) -> None:
    shim = await with_every_port_taken(stand)
    starting = stand.spawn(shim.start("extra"))
    await shim.state("extra")
    assert not starting.done()
    await shim.kill(9, "held0")
    await starting
    assert await shim.wait("extra") == 0


@pytest.mark.soak
@stand_test
async def test_stream_ports_run_out(stand: ShimStand) -> None:
    shim = await with_every_port_taken(stand)
    with pytest.raises(KataError, match=r"all 4 stream ports of the VM are in use \(a process takes one"):
        await shim.start("extra")
    assert (await shim.state("extra")).status == task.STOPPED


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


@pytest.mark.soak
@stand_test
async def test_a_kill_ends_a_process_whose_output_nobody_reads(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("yes", stdout=stand.fifo("out"))
    await shim.start()
    await shim.kill(9)
    assert await shim.wait() == KILLED


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
    assert created.stderr_port == NO_STREAM
    assert created.oci is not None
    assert created.oci.process is not None
    assert created.oci.process.terminal
    assert isinstance(resized, agent.TtyWinResizeRequest)
    assert (resized.row, resized.column) == (40, 120)
