"""A guest without a VM: an agent that runs container processes on this host, behind the channel of a VM.

It speaks the real ttrpc, agent protocol and stream frames, so the host's side can be tested against it in
milliseconds. There is no isolation: a container is a process group, its root file system is the host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Self

from common import status
from common.channel import BY_CALL, HEADER, MAX_CHUNK, NO_STREAM, StreamDecoder
from common.protocols import agent, guest
from common.protocols.stats import StatsContainerResponse
from common.ttrpc import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from common.protobuf import Message
    from common.protocols.oci import Process
    from common.testing.fake_channel import FakeChannel


class Refusal(Exception):  # noqa: N818 - it is an answer
    """An error to answer a call with."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class _Running:
    """A process and the streams that it has; ``status`` is set when it has ended and its output is out."""

    def __init__(self, request: agent.CreateContainerRequest | agent.ExecProcessRequest, process: Process) -> None:
        self.spec = process
        numbers = (request.stdin_port, request.stdout_port, request.stderr_port)
        self.is_by_call = numbers == (BY_CALL,) * 3
        self.stdin, self.stdout, self.stderr = (0 if number == NO_STREAM else number for number in numbers)
        self.child: asyncio.subprocess.Process | None = None
        self.has_begun = asyncio.Event()
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class FakeGuest:
    """Serves one channel; an async context manager.

    Attributes:
        channel: its end of the channel.
        calls: every call that came: its method and request.
        request_ids: of the calls, in the same order.
        refusals: by method, what to answer instead of doing it.
        gates: by method, what is waited for before it is done.
        stats: what to answer to StatsContainer.
        out_of_memory: ids to answer GetOOMEvent with.
        features: what it says that it can do; without stream ports it is as upstream's.
    """

    def __init__(self, channel: FakeChannel) -> None:
        self.channel = channel
        self.calls: list[tuple[str, Message]] = []
        self.request_ids: list[str] = []
        self.refusals: dict[str, Refusal] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.stats = StatsContainerResponse()
        self.out_of_memory: asyncio.Queue[str] = asyncio.Queue()
        self.features = [agent.STREAM_PORTS_FEATURE, agent.DISK_LIMITS_FEATURE, agent.RELEASE_DISKS_FEATURE]
        self._processes: dict[tuple[str, str], _Running] = {}
        self._listeners: list[asyncio.Task[object] | None] = []
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        await self.channel.listen(self._converse)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.power_off()
        await self._group.__aexit__(None, None, None)

    def power_off(self) -> None:
        """End it as a VM ends: at once, with all its processes and connections."""
        for running in self._processes.values():
            self._signal(running, signal.SIGKILL)
            if running.child is None and not running.status.done():
                running.status.cancel()
                running.has_begun.set()
        for listener in filter(None, self._listeners):
            listener.cancel()
        self.channel.close()

    def methods(self) -> list[str]:
        """Return which methods were called, in order."""
        return [method for method, _ in self.calls]

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = frames.Decoder()
        while data := await reader.read(65536):
            for frame in decoder.feed(data):
                self._group.create_task(self._answer(writer, frame))

    async def _answer(self, writer: asyncio.StreamWriter, frame: frames.Frame) -> None:
        request = frames.Request.decode(frame.payload or b"")
        kind, handler = self._handlers()[request.method]
        message = kind.decode(request.payload)
        self.calls.append((request.method, message))
        self.request_ids.append(next((pair.value for pair in request.metadata if pair.key == "request-id"), ""))
        try:
            if request.method in self.refusals:
                raise self.refusals[request.method]
            if request.method in self.gates:
                await self.gates[request.method].wait()
            answer = frames.Response(payload=(await handler(message)).encode())
        except Refusal as refusal:
            answer = frames.Response(status=frames.Status(code=refusal.code, message=refusal.text))
        except asyncio.CancelledError:
            return
        if not writer.is_closing():
            writer.write(frames.encode(frame.stream, frames.RESPONSE, answer.encode()))

    def _handlers(self) -> dict[str, tuple[type[Message], Callable[[Any], Awaitable[Message]]]]:
        return {
            "Check": (agent.CheckRequest, self._check),
            "GetGuestDetails": (agent.GuestDetailsRequest, self._details),
            "WriteStdin": (agent.WriteStreamRequest, self._write),
            "CloseStdin": (agent.CloseStdinRequest, self._close),
            "ReadStdout": (agent.ReadStreamRequest, self._reads("stdout")),
            "ReadStderr": (agent.ReadStreamRequest, self._reads("stderr")),
            "Taken": (agent.TakenRequest, self._nothing),
            "CreateSandbox": (agent.CreateSandboxRequest, self._nothing),
            "DestroySandbox": (agent.Empty, self._nothing),
            "CopyFile": (guest.CopyFileRequest, self._nothing),
            "CreateContainer": (agent.CreateContainerRequest, self._create),
            "ReleaseDisks": (agent.ReleaseDisksRequest, self._nothing),
            "StartContainer": (agent.ContainerRequest, self._start),
            "PauseContainer": (agent.ContainerRequest, self._signals(signal.SIGSTOP)),
            "ResumeContainer": (agent.ContainerRequest, self._signals(signal.SIGCONT)),
            "UpdateContainer": (agent.UpdateContainerRequest, self._nothing),
            "StatsContainer": (agent.ContainerRequest, self._tell_stats),
            "GetOOMEvent": (agent.Empty, self._next_oom),
            "ExecProcess": (agent.ExecProcessRequest, self._exec),
            "SignalProcess": (agent.SignalProcessRequest, self._kill),
            "WaitProcess": (agent.WaitProcessRequest, self._wait),
            "TtyWinResize": (agent.TtyWinResizeRequest, self._nothing),
        }

    async def _check(self, _: agent.CheckRequest) -> agent.HealthCheckResponse:
        return agent.HealthCheckResponse(status=agent.SERVING)

    async def _details(self, _: agent.GuestDetailsRequest) -> agent.GuestDetailsResponse:
        return agent.GuestDetailsResponse(agent_details=agent.AgentDetails(extra_features=list(self.features)))

    async def _write(self, request: agent.WriteStreamRequest) -> agent.WriteStreamResponse:
        stdin = self._child(request).stdin
        assert stdin is not None
        stdin.write(request.data)
        await stdin.drain()
        return agent.WriteStreamResponse(len=len(request.data))

    async def _close(self, request: agent.CloseStdinRequest) -> agent.Empty:
        stdin = self._child(request).stdin
        assert stdin is not None
        stdin.close()
        return agent.Empty()

    def _reads(self, name: str) -> Callable[[agent.ReadStreamRequest], Awaitable[agent.ReadStreamResponse]]:
        async def read(request: agent.ReadStreamRequest) -> agent.ReadStreamResponse:
            running = self._processes[request.container_id, request.exec_id]
            await running.has_begun.wait()
            if running.child is None:
                raise Refusal(status.INTERNAL, "read meet eof")
            source: asyncio.StreamReader = getattr(running.child, name)
            return agent.ReadStreamResponse(data=await source.read(request.len))

        return read

    def _child(self, request: agent.WriteStreamRequest | agent.CloseStdinRequest) -> asyncio.subprocess.Process:
        running = self._processes.get((request.container_id, request.exec_id))
        if running is None or running.child is None:
            raise Refusal(status.NOT_FOUND, "no such process")
        return running.child

    async def _nothing(self, _: Message) -> agent.Empty:
        return agent.Empty()

    async def _tell_stats(self, _: agent.ContainerRequest) -> StatsContainerResponse:
        return self.stats

    async def _next_oom(self, _: agent.Empty) -> agent.OomEvent:
        self._listeners.append(asyncio.current_task())
        return agent.OomEvent(container_id=await self.out_of_memory.get())

    async def _create(self, request: agent.CreateContainerRequest) -> agent.Empty:
        if request.oci is None or request.oci.process is None:
            raise Refusal(status.INVALID_ARGUMENT, "no process")
        self._processes[request.container_id, request.container_id] = _Running(request, request.oci.process)
        return agent.Empty()

    async def _start(self, request: agent.ContainerRequest) -> agent.Empty:
        await self._run(self._processes[request.container_id, request.container_id])
        return agent.Empty()

    async def _exec(self, request: agent.ExecProcessRequest) -> agent.Empty:
        if request.process is None:
            raise Refusal(status.INVALID_ARGUMENT, "no process")
        running = _Running(request, request.process)
        self._processes[request.container_id, request.exec_id] = running
        await self._run(running)
        return agent.Empty()

    async def _wait(self, request: agent.WaitProcessRequest) -> agent.WaitProcessResponse:
        running = self._processes[request.container_id, request.exec_id]
        return agent.WaitProcessResponse(status=await asyncio.shield(running.status))

    async def _kill(self, request: agent.SignalProcessRequest) -> agent.Empty:
        for (container_id, exec_id), running in self._processes.items():
            if container_id == request.container_id and request.exec_id in ("", exec_id):
                self._signal(running, request.signal)
        return agent.Empty()

    def _signals(self, number: int) -> Callable[[agent.ContainerRequest], Awaitable[agent.Empty]]:
        async def signal_all(request: agent.ContainerRequest) -> agent.Empty:
            return await self._kill(agent.SignalProcessRequest(container_id=request.container_id, signal=number))

        return signal_all

    def _signal(self, running: _Running, number: int) -> None:
        if running.child is None:
            if not running.status.done():
                running.status.set_result(128 + number)
                running.has_begun.set()
        elif running.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.child.pid, number)

    async def _run(self, running: _Running) -> None:
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            running.child = await asyncio.create_subprocess_exec(
                *running.spec.args,
                stdin=pipe if running.stdin or running.is_by_call else null,
                stdout=pipe if running.stdout or running.is_by_call else null,
                stderr=pipe if running.stderr or running.is_by_call else asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as err:
            for stream in filter(None, (running.stdout, running.stderr)):
                self.channel.stream(stream)[1].write(HEADER.pack(stream, 0))
            running.status.set_result(255)
            raise Refusal(status.INTERNAL, f"executable file `{running.spec.args[0]}` not found") from err
        running.has_begun.set()
        self._group.create_task(self._see_through(running, running.child))

    async def _see_through(self, running: _Running, child: asyncio.subprocess.Process) -> None:
        feeder = (
            self._group.create_task(self._feed(running.stdin, child.stdin)) if running.stdin and child.stdin else None
        )
        async with asyncio.TaskGroup() as pumps:
            for stream, source in ((running.stdout, child.stdout), (running.stderr, child.stderr)):
                if stream and source is not None:
                    pumps.create_task(self._drain(stream, source))
        code = await child.wait()
        if feeder is not None:
            feeder.cancel()
        running.status.set_result(code if code >= 0 else 128 - code)

    async def _feed(self, stream: int, sink: asyncio.StreamWriter) -> None:
        reader, _ = self.channel.stream(stream)
        decoder = StreamDecoder(stream)
        with contextlib.suppress(ConnectionError):
            while not decoder.is_ended and (data := await reader.read(MAX_CHUNK)):
                for payload in decoder.feed(data):
                    sink.write(payload)
                await sink.drain()
            sink.close()

    async def _drain(self, stream: int, source: asyncio.StreamReader) -> None:
        _, writer = self.channel.stream(stream)
        with contextlib.suppress(ConnectionError):
            while data := await source.read(MAX_CHUNK):
                writer.write(HEADER.pack(stream, len(data)) + data)
                await writer.drain()
            writer.write(HEADER.pack(stream, 0))
            await writer.drain()
