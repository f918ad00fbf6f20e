"""Standard streams: FIFOs, ports, frames, back-pressure; the VM's side is a Unix socket in the test."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import socket
from typing import TYPE_CHECKING, Self

import pytest

from common.channel import HEADER, MAX_FRAME, NO_STREAM, StreamDecoder, stream_number
from common.errors import ExhaustedError, NotFoundError, UsageError
from procs.shim import outlets
from procs.shim.fifos import Inlet
from procs.shim.ports import READ_SIZE, ProcessName
from procs.shim.serial import StreamPorts
from procs.shim.streams import Streams
from procs.shim.tasks import Stdio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from procs.shim.ports import PortUse


NAME = ProcessName(container_id="c", exec_id="c", is_terminal=False)
OWNER = outlets.Owner(id="c", namespace="n", sandbox_id="s")


class Vm:
    """The VM's end of stream ports."""

    def __init__(self, directory: Path, group: asyncio.TaskGroup, count: int = 2) -> None:
        self.directory = directory
        self.group = group
        self._listeners: list[socket.socket] = []
        self._open: list[socket.socket] = []
        for port in range(count):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(directory / f"p{port}"))
            listener.listen()
            self._listeners.append(listener)
        self.ports = StreamPorts([str(directory / f"p{port}") for port in range(count)], wait_s=0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in (*self._listeners, *self._open):
            sock.close()

    def accept(self, port: int = 0) -> socket.socket:
        """Return the VM's end of a port that the host has opened."""
        sock, _ = self._listeners[port].accept()
        sock.setblocking(False)
        self._open.append(sock)
        return sock

    async def take(self) -> PortUse:
        (use,) = await self.ports.take(1, NAME, self.group)
        return use

    def fifo(self, name: str) -> str:
        path = self.directory / name
        os.mkfifo(path)
        return str(path)


def vm_test(test: Callable[[Vm], Awaitable[None]]) -> Callable[[Path], None]:
    """Run an asynchronous test with a VM of two ports."""

    async def run(path: Path) -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            with Vm(path, group) as vm:
                await test(vm)

    @functools.wraps(test)
    def wrapper(tmp_path: Path) -> None:
        asyncio.run(run(tmp_path))

    del wrapper.__wrapped__  # pytest would take the parameter for a fixture
    return wrapper


def frame(stream: int, payload: bytes) -> bytes:
    return HEADER.pack(stream, len(payload)) + payload


@vm_test
async def test_every_use_of_a_port_has_a_number_of_its_own(vm: Vm) -> None:
    first = await vm.take()
    second = await vm.take()
    assert (first.stream, second.stream) == (stream_number(1, 0), stream_number(2, 1))
    with pytest.raises(ExhaustedError, match="all 2 stream ports"):
        await vm.take()
    await vm.ports.give_back(first)
    third = await vm.take()
    assert third.stream == stream_number(3, 0)
    await vm.ports.give_back(second)
    await vm.ports.give_back(third)


@vm_test
async def test_a_port_whose_output_has_not_ended_stays_taken(vm: Vm) -> None:
    use = await vm.take()
    use.has_output = True
    await vm.ports.give_back(use)
    other = await vm.take()
    assert other.stream == stream_number(2, 1)
    with pytest.raises(ExhaustedError):
        await vm.take()
    await vm.ports.give_back(other)


@vm_test
async def test_who_wants_a_port_waits_for_one_and_takes_both_or_none(vm: Vm) -> None:
    ports = StreamPorts([str(vm.directory / f"p{port}") for port in range(2)], wait_s=60)
    first, second = await ports.take(2, NAME, vm.group)
    both, one = (vm.group.create_task(ports.take(count, NAME, vm.group)) for count in (2, 1))
    await ports.give_back(first)
    (third,) = await one
    assert not both.done()
    await ports.give_back(second)
    await ports.give_back(third)
    for use in await both:
        await ports.give_back(use)


class Client:
    """Who reads an output that is a pipe."""

    def __init__(self) -> None:
        self.pipe, fd = os.pipe2(os.O_NONBLOCK)
        self.outlet = outlets.Outlet(fd)

    def read(self) -> bytes:
        """Return what has come since it was asked last."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 1 << 20):
                data += chunk
        return data

    def close(self) -> None:
        os.close(self.pipe)
        self.outlet.close()


@contextlib.contextmanager
def client_of() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


async def carried(use: PortUse) -> bytes:
    with client_of() as client:
        await use.carry(client.outlet)
        return client.read()


@vm_test
async def test_frames_of_an_earlier_use_are_dropped(vm: Vm) -> None:
    use = await vm.take()
    guest = vm.accept()
    earlier = use.stream - 256
    guest.sendall(frame(earlier, b"old") + frame(use.stream, b"new") + frame(earlier, b"") + frame(use.stream, b""))
    assert await carried(use) == b"new"
    assert await use.close()


@vm_test
async def test_a_guest_that_never_pauses_keeps_nobody_waiting(vm: Vm) -> None:
    """Frames of one byte, always more of them than are read at once."""
    use = await vm.take()
    guest = vm.accept()
    sent = guest.send(frame(use.stream, b"x") * 30_000)
    assert sent > 3 * READ_SIZE, "else this test shows nothing"
    with client_of() as client:
        carrying = vm.group.create_task(use.carry(client.outlet))
        await asyncio.sleep(0)
        seen = len(client.read())
        assert 0 < seen < sent // (HEADER.size + 1)
        guest.close()
        await carrying
        assert seen + len(client.read()) == sent // (HEADER.size + 1)
    await use.close()


@vm_test
async def test_a_vm_that_ends_ends_its_output(vm: Vm) -> None:
    use = await vm.take()
    guest = vm.accept()
    guest.sendall(frame(use.stream, b"half")[:-1])
    guest.close()
    assert await carried(use) == b"hal"
    await use.close()


@vm_test
async def test_a_vm_that_ends_within_a_large_frame_ends_its_output(vm: Vm) -> None:
    use = await vm.take()
    use.has_output = True
    guest = vm.accept()
    data = os.urandom(60_000)
    guest.sendall(HEADER.pack(use.stream, MAX_FRAME) + data)
    guest.close()
    assert await carried(use) == data
    assert not await use.close()


@vm_test
async def test_large_frames_come_whole_at_the_pace_of_both_ends(vm: Vm) -> None:
    use = await vm.take()
    guest, loop = vm.accept(), asyncio.get_running_loop()
    frames = [os.urandom(size) for size in (MAX_FRAME, 1, 32 << 10, MAX_FRAME, 100_000, (32 << 10) + 1)]

    async def send() -> None:
        for payload in (*frames, b""):
            data = frame(use.stream, payload)
            for at in range(0, len(data), 50_000):
                await loop.sock_sendall(guest, data[at : at + 50_000])
                await asyncio.sleep(0.001)  # the port is empty now and then

    sending = vm.group.create_task(send())
    with client_of() as client:
        carrying = vm.group.create_task(use.carry(client.outlet))
        received = b""
        while not carrying.done():
            await asyncio.sleep(0.005)  # the pipe is full now and then
            received += os.read(client.pipe, 65536) if select.select([client.pipe], [], [], 0)[0] else b""
        assert received + client.read() == b"".join(frames)
    await sending
    await use.close()


@vm_test
async def test_a_large_frame_that_nobody_wants_any_more_is_read_to_its_end(vm: Vm) -> None:
    use = await vm.take()
    use.has_output = True
    guest, loop = vm.accept(), asyncio.get_running_loop()
    sending = vm.group.create_task(
        loop.sock_sendall(guest, frame(use.stream, bytes(MAX_FRAME)) * 40 + frame(use.stream, b""))
    )
    with client_of() as client:
        carrying = vm.group.create_task(use.carry(client.outlet))
        await asyncio.sleep(0.05)
        assert not carrying.done(), "the pipe is full"
        client.outlet.drop()
        await carrying
    await sending
    assert await use.close()


@vm_test
async def test_a_reader_that_is_gone_costs_its_output_only(vm: Vm) -> None:
    use = await vm.take()
    use.has_output = True
    guest, loop = vm.accept(), asyncio.get_running_loop()
    with client_of() as client:
        os.close(client.pipe)
        client.pipe = os.open("/dev/null", os.O_RDONLY)
        carrying = vm.group.create_task(use.carry(client.outlet))
        await loop.sock_sendall(guest, frame(use.stream, bytes(MAX_FRAME)) + frame(use.stream, b""))
        await carrying
    assert await use.close()


@vm_test
async def test_a_socket_that_cannot_be_spliced_is_read(vm: Vm) -> None:
    """As those of the kernel's vsock are in some kernels."""
    use = await vm.take()
    guest, loop = vm.accept(), asyncio.get_running_loop()
    data = os.urandom(40_000)
    with client_of() as client, pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object, **__: object) -> int:
            raise OSError(errno.EINVAL, "not with this socket")

        patch.setattr(os, "splice", refuse)
        await loop.sock_sendall(guest, frame(use.stream, data) + frame(use.stream, b""))
        await use.carry(client.outlet)
        assert client.read() == data
    await use.close()


@vm_test
async def test_a_frame_that_was_begun_is_finished(vm: Vm) -> None:
    """A process that ended with input on its way: the next user of the port must not get the rest of it."""
    use = await vm.take()
    guest = vm.accept()
    chunk = b"x" * (64 << 10)
    decoder = StreamDecoder(use.stream)

    async def flood() -> None:
        while True:
            await use.send(chunk)

    flooding = vm.group.create_task(flood())
    loop = asyncio.get_running_loop()
    first = await loop.sock_recv(guest, 1)
    flooding.cancel()
    await asyncio.wait({flooding})
    closing = vm.group.create_task(use.close())
    received = b"".join(decoder.feed(first))
    while data := await loop.sock_recv(guest, 65536):
        received += b"".join(decoder.feed(data))
    assert await closing
    assert received == chunk * (len(received) // len(chunk))
    assert decoder.is_between_frames


@vm_test
async def test_output_goes_at_the_pace_of_its_reader(vm: Vm) -> None:
    """A FIFO that nobody reads stops the port, and loses nothing when somebody does."""
    path = vm.fifo("out")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    streams = Streams(Stdio(stdout=path), OWNER, vm.group)
    numbers = await streams.connect(vm.ports, NAME)
    assert (numbers.stdin, numbers.stderr) == (NO_STREAM, NO_STREAM)
    pumping = vm.group.create_task(streams.pump_output())
    guest, loop = vm.accept(), asyncio.get_running_loop()
    data = os.urandom(4 << 20)
    stalled = asyncio.Event()

    async def send() -> None:
        for at in range(0, len(data), 32 << 10):
            guest_data = frame(numbers.stdout, data[at : at + (32 << 10)])
            try:
                sent = guest.send(guest_data)
            except BlockingIOError:
                sent = 0
            if sent < len(guest_data):
                stalled.set()
                await loop.sock_sendall(guest, guest_data[sent:])
        await loop.sock_sendall(guest, frame(numbers.stdout, b""))

    sending = vm.group.create_task(send())
    await stalled.wait()
    assert not sending.done()
    received = bytearray()
    while not (pumping.done() and len(received) == len(data)):
        try:
            received += os.read(reader, 65536)
        except BlockingIOError:
            await asyncio.sleep(0)
    assert received == data
    streams.close()
    assert os.read(reader, 1) == b"", "the client sees the end"
    os.close(reader)


@vm_test
async def test_what_nobody_reads_can_be_dropped(vm: Vm) -> None:
    streams = Streams(Stdio(stdout=vm.fifo("out")), OWNER, vm.group)
    numbers = await streams.connect(vm.ports, NAME)
    pumping = vm.group.create_task(streams.pump_output())
    guest, loop = vm.accept(), asyncio.get_running_loop()
    data = frame(numbers.stdout, bytes(32 << 10)) * 64 + frame(numbers.stdout, b"")
    sending = vm.group.create_task(loop.sock_sendall(guest, data))
    await asyncio.sleep(0)
    assert not sending.done()
    streams.drop_output()
    await pumping
    streams.close()


@vm_test
async def test_input_ends_when_its_keeper_and_its_clients_are_gone(vm: Vm) -> None:
    path = vm.fifo("in")
    client = os.open(path, os.O_RDWR)
    inlet = Inlet(path)
    os.write(client, b"first")
    assert await inlet.read(100) == b"first"
    os.close(client)
    reading = vm.group.create_task(inlet.read(100))
    await asyncio.sleep(0)
    assert not reading.done(), "the shim's own writer keeps it open for the next client"
    inlet.end()
    assert await reading == b""
    inlet.close()


@vm_test
async def test_a_terminal_takes_one_port(vm: Vm) -> None:
    stdio = Stdio(stdin=vm.fifo("in"), stdout=vm.fifo("out"), stderr=vm.fifo("err"), is_terminal=True)
    streams = Streams(stdio, OWNER, vm.group)
    numbers = await streams.connect(vm.ports, NAME)
    assert numbers.stdin == numbers.stdout == stream_number(1, 0)
    assert numbers.stderr == NO_STREAM
    streams.close()


@vm_test
async def test_a_process_without_streams_takes_no_port(vm: Vm) -> None:
    streams = Streams(Stdio(), OWNER, vm.group)
    numbers = await streams.connect(vm.ports, NAME)
    assert (numbers.stdin, numbers.stdout, numbers.stderr) == (NO_STREAM,) * 3
    await streams.pump_output()
    await streams.pump_input()
    streams.close()


@pytest.mark.parametrize("name", ["file", "fifo://file"])
def test_output_that_is_no_fifo_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = name.replace("file", str(tmp_path / "file"))
    for stdio in (Stdio(stdout=path), Stdio(stderr=path)):
        with pytest.raises(UsageError, match="file is not a FIFO"):
            outlets.check(stdio)


def test_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing does not exist"):
        Inlet(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("http://x", "unknown STDIO scheme http"),
        ("file://log", "no absolute path"),
        ("binary://x", "no absolute path"),
    ],
)
def test_output_of_no_known_kind_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        outlets.check(Stdio(stdout=name))


@vm_test
async def test_output_that_cannot_be_written_is_dropped(vm: Vm) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.close(reader)
    outlet = outlets.Outlet(writer)
    await outlet.write(b"x" * 100)
    await outlet.write(b"y")
    outlet.close()
