"""``containerd.task.v2.Task``, and v3, which is the same: the verbs that containerd asks for.

Each verb runs in a task of its own and none holds a lock: what must not happen twice is settled by the state of the
process (:mod:`procs.shim.tasks`) before the first ``await``. Every call gets a request id here, which the log, the bus
and the guest see.

This version runs one container in a sandbox, under the sandbox's own id.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
from typing import TYPE_CHECKING, Any

from common import log
from common.errors import AlreadyExistsError, KataError, NotFoundError, UnsupportedError
from common.protocols import events, task
from procs.shim import bundle, metrics
from procs.shim.abandonment import SHUTDOWN_TIMEOUT_S, wait_abandoned
from procs.shim.container import Container
from procs.shim.tasks import Ask, Process, State, Stdio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.protobuf import Message
    from common.ttrpc.server import Handler, TtrpcServer
    from procs.shim.events import EventSender
    from procs.shim.process import GuestProcess
    from procs.shim.sandbox import Sandbox

FLUSH_TIMEOUT_S = 2
_AT_ONCE = frozenset(("Create", "Shutdown"))
"""Verbs that do not wait for a Create that is under way. The others do, as in runc's shim: a containerd that starts
again asks for the processes, and ends a shim that says there is no container."""

_STATUS = {
    State.CREATED: task.CREATED,
    State.STARTING: task.CREATED,
    State.RUNNING: task.RUNNING,
    State.PAUSING: task.PAUSING,
    State.PAUSED: task.PAUSED,
    State.RESUMING: task.PAUSED,
    State.STOPPED: task.STOPPED,
}


class TaskService:
    """The Task API of one sandbox.

    Attributes:
        is_shut_down: set when the shim is to end, since containerd has asked for that or is gone, and nothing is left.
    """

    def __init__(self, sandbox: Sandbox, sender: EventSender, group: asyncio.TaskGroup) -> None:
        self.is_shut_down = asyncio.Event()
        self._sandbox = sandbox
        self._events = sender
        self._group = group
        self._container: Container | None = None
        self._is_unused = asyncio.Event()
        self._is_unused.set()
        self._is_settled = asyncio.Event()
        self._is_settled.set()

    def methods(self) -> Mapping[tuple[str, str], tuple[type[Message], Handler]]:
        """Return what a ttrpc server is to serve."""
        table: dict[str, tuple[type[Message], Handler]] = {
            "Create": (task.CreateTaskRequest, self.create),
            "Start": (task.StateRequest, self.start),
            "State": (task.StateRequest, self.state),
            "Wait": (task.StateRequest, self.wait),
            "Exec": (task.ExecProcessRequest, self.exec),
            "Kill": (task.KillRequest, self.kill),
            "Pids": (task.IdRequest, self.pids),
            "CloseIO": (task.CloseIORequest, self.close_io),
            "ResizePty": (task.ResizePtyRequest, self.resize_pty),
            "Connect": (task.IdRequest, self.connect),
            "Delete": (task.StateRequest, self.delete),
            "Pause": (task.IdRequest, functools.partial(self.halt, Ask.PAUSE)),
            "Resume": (task.IdRequest, functools.partial(self.halt, Ask.RESUME)),
            "Stats": (task.IdRequest, self.stats),
            "Update": (task.UpdateTaskRequest, self.update),
            "Checkpoint": (task.CheckpointTaskRequest, self.checkpoint),
            "Shutdown": (task.ShutdownRequest, self.shutdown),
        }
        bound = {name: (kind, self._bind(name, verb)) for name, (kind, verb) in table.items()}
        return {(service, name): bound[name] for service in (task.SERVICE, task.SERVICE_V3) for name in bound}

    async def run(self) -> None:
        """When the VM ends, whoever ended it, end what was never started, and the sandbox."""
        await self._sandbox.is_gone.wait()
        if self._container is not None:
            self._container.lose()
        await self._sandbox.stop()

    async def end_when_abandoned(self, server: TtrpcServer) -> None:
        """End the shim when it holds no container and containerd is gone."""
        await wait_abandoned(server, self._is_unused)
        log.get().warning("nobody is connected and there is no container")
        await self._end()

    async def create(self, request: task.CreateTaskRequest) -> task.PidResponse:
        """Prepare the container while the guest boots.

        If it cannot be, nobody needs the VM: it ends, whether or not that is asked for.

        Raises:
            KataError: why the sandbox or the container cannot be.
        """
        self._check_create(request)
        self._is_unused.clear()
        self._is_settled.clear()
        try:
            self._container = container = await self._create(request)
        except BaseException:
            self._is_unused.set()
            self._group.create_task(self._end_after_failure())
            raise
        finally:
            self._is_settled.set()
        self._publish_create(request, container.guest.pid)
        self._group.create_task(self._follow(container))
        self._group.create_task(self._watch_memory(container))
        return task.PidResponse(pid=container.guest.pid)

    async def start(self, request: task.StateRequest) -> task.PidResponse:
        """Start the container's own process or an exec."""
        container = self._found(request.id)
        if request.exec_id:
            await container.start_exec(request.exec_id)
        else:
            await container.start()
        return task.PidResponse(pid=container.guest.pid)

    async def state(self, request: task.StateRequest) -> task.StateResponse:
        """Tell the state of a process."""
        container = self._found(request.id)
        process = container.process(request.exec_id).process
        return task.StateResponse(
            id=process.exec_id or process.container_id,
            bundle=container.bundle,
            pid=container.guest.pid,
            status=_STATUS[container.state(request.exec_id)],
            stdin=process.stdio.stdin,
            stdout=process.stdio.stdout,
            stderr=process.stdio.stderr,
            terminal=process.stdio.is_terminal,
            exit_status=process.exit_status,
            exited_at=_exited_at(process),
            exec_id=process.exec_id,
        )

    async def wait(self, request: task.StateRequest) -> task.WaitResponse:
        """Answer when a process has ended."""
        target = self._process(request)
        await target.exited.wait()
        return task.WaitResponse(exit_status=target.process.exit_status, exited_at=_exited_at(target.process))

    async def exec(self, request: task.ExecProcessRequest) -> task.Empty:
        """Register a further process."""
        process = bundle.read_process(request)
        await self._found(request.id).add_exec(request.exec_id, process, _stdio(request))
        return task.Empty()

    async def kill(self, request: task.KillRequest) -> task.Empty:
        """Send a signal."""
        await self._process(request).kill(request.signal, is_all=request.all)
        return task.Empty()

    async def pids(self, request: task.IdRequest) -> task.PidsResponse:
        """Name the processes that the host sees: the VMM. containerd takes an empty list for a leaked shim."""
        return task.PidsResponse(processes=[task.ProcessInfo(pid=self._found(request.id).guest.pid)])

    async def close_io(self, request: task.CloseIORequest) -> task.Empty:
        """Let standard input end, once what clients wrote has arrived."""
        if request.stdin:
            self._process(request).end_input()
        return task.Empty()

    async def resize_pty(self, request: task.ResizePtyRequest) -> task.Empty:
        """Set the size of a terminal."""
        await self._process(request).resize(rows=request.height, columns=request.width)
        return task.Empty()

    async def connect(self, request: task.IdRequest) -> task.ConnectResponse:
        """Tell who serves. Never an error, as in runc's shim: without such a container there is no pid."""
        container = self._container
        pid = container.guest.pid if container is not None and container.container_id == request.id else 0
        return task.ConnectResponse(shim_pid=os.getpid(), task_pid=pid, version="")

    async def delete(self, request: task.StateRequest) -> task.DeleteResponse:
        """Forget a process that does not run. With the container's own goes the sandbox."""
        container = self._found(request.id)
        if request.exec_id:
            process = await container.delete_exec(request.exec_id)
        else:
            container.process("").process.check(Ask.DELETE)
            await self._sandbox.stop()
            process = await container.forget()
            self._container = None
            self._is_unused.set()
        pid, exited_at = container.guest.pid, _exited_at(process)
        return task.DeleteResponse(pid=pid, exit_status=process.exit_status, exited_at=exited_at)

    async def halt(self, ask: Ask, request: task.IdRequest) -> task.Empty:
        """Pause a container, or let it go on."""
        await self._found(request.id).halt(ask)
        return task.Empty()

    async def stats(self, request: task.IdRequest) -> task.StatsResponse:
        """Tell what a container has used."""
        return task.StatsResponse(stats=metrics.any_of(await self._found(request.id).stats()))

    async def update(self, request: task.UpdateTaskRequest) -> task.Empty:
        """Change a container's limits; the VM keeps its size."""
        await self._found(request.id).update(bundle.read_limits(request))
        return task.Empty()

    async def checkpoint(self, request: task.CheckpointTaskRequest) -> task.Empty:
        """Refuse: the state of a VM's container is not one that CRIU could restore (upstream's answer too)."""
        self._found(request.id)
        raise UnsupportedError(f"checkpoint of {request.id}: the container of a VM cannot be checkpointed")

    async def shutdown(self, _: task.ShutdownRequest) -> task.Empty:
        """End the shim, unless there is a container; ``now`` changes nothing, as in runc's shim."""
        if self._is_unused.is_set():
            await self._end()
        return task.Empty()

    async def _end_after_failure(self) -> None:
        """Have no VM at once, and no shim soon, since whoever asked for the container may have died."""
        await self._sandbox.stop()
        try:
            await asyncio.wait_for(self.is_shut_down.wait(), SHUTDOWN_TIMEOUT_S)
        except TimeoutError:
            await self._end()

    async def _end(self) -> None:
        await self._sandbox.stop()
        await self._events.flush(FLUSH_TIMEOUT_S)
        self.is_shut_down.set()

    def _bind(self, name: str, verb: Callable[[Any], Awaitable[Message]]) -> Handler:
        """Give a verb a request id per call, and a line in the log."""

        async def call(request: Any) -> Message:  # noqa: ANN401 - the table above pairs verb and type
            ids = {"container": request.id, "exec": getattr(request, "exec_id", "")}
            with log.bound(request=secrets.token_hex(8), **ids):
                log.get().debug("call", verb=name)
                if name not in _AT_ONCE:
                    await self._is_settled.wait()
                return await verb(request)

        return call

    def _check_create(self, request: task.CreateTaskRequest) -> None:
        sandbox_id = self._sandbox.sandbox_id
        if not self._is_unused.is_set():
            raise AlreadyExistsError(f"id {request.id}")
        if request.id != sandbox_id:
            raise UnsupportedError(f"container {request.id} in sandbox {sandbox_id}: pods are not supported yet")
        if request.checkpoint or request.parent_checkpoint:
            raise UnsupportedError(f"checkpoint of {request.id}: a VM's container cannot be restored")

    async def _create(self, request: task.CreateTaskRequest) -> Container:
        config = await self._sandbox.wait_shareable()
        wanted = bundle.read(request, config)
        if config.hypervisor.can_share:
            await self._sandbox.mount(request.id, wanted.rootfs, wanted.mounts)
        else:
            from procs.shim import copies

            wanted = await asyncio.to_thread(copies.with_copies, wanted, request.id, config.hypervisor.name)
        guest = await self._sandbox.wait_booted()
        init = Process(container_id=request.id, exec_id="", stdio=_stdio(request))
        container = Container(init, request.bundle, guest, self._events, self._group)
        await container.create(wanted)
        return container

    async def _follow(self, container: Container) -> None:
        """See the container to its end, and end the sandbox with it: Delete then has little to wait for."""
        await container.follow()
        await self._sandbox.stop()

    async def _watch_memory(self, container: Container) -> None:
        """Tell when memory runs out; the next time is asked for when containerd knows, lest a guest fill our queue."""
        with contextlib.suppress(KataError):  # the VM has ended, or its agent cannot tell
            while True:
                if await container.guest.agent.next_oom() == container.container_id:
                    container.note_oom()
                await self._events.wait_idle()

    def _publish_create(self, request: task.CreateTaskRequest, pid: int) -> None:
        io = events.TaskIO(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal)
        self._events.publish(
            events.TaskCreate(
                container_id=request.id,
                bundle=request.bundle,
                rootfs=request.rootfs,
                io=io,
                checkpoint="",
                pid=pid,
            )
        )

    def _found(self, container_id: str) -> Container:
        if self._container is None or container_id != self._container.container_id:
            raise NotFoundError(f"container {container_id}")
        return self._container

    def _process(
        self, request: task.StateRequest | task.KillRequest | task.CloseIORequest | task.ResizePtyRequest
    ) -> GuestProcess:
        return self._found(request.id).process(request.exec_id)


def _stdio(request: task.CreateTaskRequest | task.ExecProcessRequest) -> Stdio:
    return Stdio(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, is_terminal=request.terminal)


def _exited_at(process: Process) -> task.Timestamp | None:
    return task.Timestamp.from_ns(process.exited_at_ns) if process.exited_at_ns else None
