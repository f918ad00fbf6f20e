"""A container in its guest: its own process, its execs, and the order in which they begin and end."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import KataError, StateError, UnavailableError
from common.protocols import events
from common.protocols.stats import OOM_KILLS, CgroupStats, MemoryStats, StatsContainerResponse
from common.protocols.task import Timestamp
from procs.shim.disk import released
from procs.shim.hooks import Hooks
from procs.shim.process import GuestProcess
from procs.shim.tasks import HALTED, Ask, Process, State, Task

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from common.protocols import oci
    from common.services.device import Device
    from common.services.vmm import DeviceSpec
    from procs.shim.bundle import Wanted
    from procs.shim.events import EventSender
    from procs.shim.sandbox import Guest
    from procs.shim.tasks import Stdio


@dataclass(frozen=True, slots=True, kw_only=True)
class _Halt:
    """One way between running and paused: by which state to which, what the guest is asked, and the event."""

    via: State
    to: State
    method: str
    news: type[events.TaskPaused | events.TaskResumed]


_HALTS = {
    Ask.PAUSE: _Halt(via=State.PAUSING, to=State.PAUSED, method="PauseContainer", news=events.TaskPaused),
    Ask.RESUME: _Halt(via=State.RESUMING, to=State.RUNNING, method="ResumeContainer", news=events.TaskResumed),
}


class Container:
    """The container of a sandbox.

    Attributes:
        container_id: its id.
        bundle: its bundle's directory.
        guest: where it is.
    """

    def __init__(self, init: Process, bundle: str, guest: Guest, sender: EventSender, group: asyncio.TaskGroup) -> None:
        self.container_id = init.container_id
        self.bundle = bundle
        self.guest = guest
        self._events = sender
        self._group = group
        self._task = Task(init=init)
        self._init = GuestProcess(init, guest, sender, group)
        self._execs: dict[str, GuestProcess] = {}
        self._exec_specs: dict[str, oci.Process] = {}
        self._stats = StatsContainerResponse()
        self._oom_kills = 0
        self._hooks: Hooks

    async def create(self, wanted: Wanted) -> None:
        """Execute the host's hooks and have the guest prepare it.

        Raises:
            KataError: a hook failed, or the guest cannot; the streams are given up.
        """
        self._hooks = Hooks(
            wanted.hooks, wanted.spec, container_id=self.container_id, bundle=self.bundle, pid=self.guest.pid
        )
        try:
            await self._hooks.prepare()
            await self._prepare(wanted)
            self._init.note_known()
        except BaseException:
            await self._init.discard()
            raise

    async def _prepare(self, wanted: Wanted) -> None:
        """Have the guest prepare it, with the disks and the devices of the host that it has."""
        devices, holder, limit_s = self.guest.devices, self.container_id, self.guest.create_timeout_s
        numbers = await self._init.connect()
        for copy in wanted.copies:
            await self.guest.agent.copy(copy)
        plugged: dict[DeviceSpec, Device] = {}
        async with AsyncExitStack() as use:
            for spec in wanted.devices():
                plugged[spec] = await devices.plug(spec, holder=holder, use_s=limit_s)
                using = devices.taken_into_use(plugged[spec], holder=holder, let_go=self._let_go)
                await use.enter_async_context(using)
            await self.guest.agent.create_container(
                self.container_id,
                wanted.spec,
                numbers,
                limit_s,
                storages=[disk.storage(plugged[disk.spec]) for disk in wanted.disks] + wanted.storages,
                devices=[node.device(plugged[node.spec]) for node in wanted.nodes]
                + [group.device(plugged) for group in wanted.groups],
            )

    async def _let_go(self, plugged: Device) -> bool:
        disk = released(plugged)
        return disk is not None and await self.guest.agent.release_disk(disk)

    async def follow(self) -> None:
        """See its own process to the end; the ends of its execs are told first."""
        await self._init.follow(self._live_execs)

    def process(self, exec_id: str) -> GuestProcess:
        """Return its own process, or the exec that is named.

        Raises:
            NotFoundError: there is no such exec.
        """
        self._task.process(exec_id)
        return self._execs[exec_id] if exec_id else self._init

    async def add_exec(self, exec_id: str, spec: oci.Process, stdio: Stdio) -> None:
        """Register an exec; while the container starts, when it has.

        Raises:
            KataError: the id is taken, the container has ended, or the streams are not what we can use.
        """
        await self._init.wait_settled()
        process = self._task.add_exec(exec_id, stdio)
        try:
            self._execs[exec_id] = GuestProcess(process, self.guest, self._events, self._group)
        except BaseException:
            del self._task.execs[exec_id]
            raise
        self._exec_specs[exec_id] = spec
        self._events.publish(events.TaskExecAdded(container_id=self.container_id, exec_id=exec_id))

    async def start(self) -> None:
        """Start its own process."""
        news = events.TaskStart(container_id=self.container_id, pid=self.guest.pid)
        await self._init.start(lambda: self.guest.agent.call_container("StartContainer", self.container_id), news)
        await self._hooks.started()

    async def start_exec(self, exec_id: str) -> None:
        """Start an exec.

        Raises:
            StateError: the container does not run.
        """
        target = self.process(exec_id)
        await self._init.wait_settled()
        state = self._init.process.state
        if state in HALTED:
            raise StateError("cannot exec in a paused container")
        if state is not State.RUNNING:
            raise StateError(f"cannot start exec {exec_id}: container {self.container_id} is {state.value}")
        news = events.TaskExecStarted(container_id=self.container_id, exec_id=exec_id, pid=self.guest.pid)
        await target.start(lambda: self._begin_exec(exec_id, target), news)
        self._group.create_task(target.follow())

    async def halt(self, ask: Ask) -> None:
        """Pause it, or let it go on: all of its processes, execs included.

        Args:
            ask: ``PAUSE`` or ``RESUME``.

        Raises:
            KataError: its state does not allow it, it ended meanwhile, or the guest cannot; then it is as it was.
        """
        halt, init = _HALTS[ask], self._init.process
        await self._init.wait_settled()
        init.check(ask)
        before = init.state
        init.move(halt.via)
        try:
            await self.guest.agent.call_container(halt.method, self.container_id)
        except KataError:
            if init.state is halt.via:
                init.move(before)
            raise
        if init.state is not halt.via:
            init.check(ask)
        init.move(halt.to)
        self._events.publish(halt.news(container_id=self.container_id))

    async def update(self, resources: oci.LinuxResources) -> None:
        """Change its limits.

        Raises:
            KataError: it has ended, or the guest cannot.
        """
        await self._init.wait_settled()
        self._init.process.check(Ask.UPDATE)
        await self.guest.agent.update_container(self.container_id, resources)

    async def stats(self) -> StatsContainerResponse:
        """Return what it has used.

        Its end takes the VM along, and clients ask once more to learn whether memory ran out: of one that has ended it
        is what was known last, and how often that happened.
        """
        with suppress(UnavailableError):  # the VM ends
            self._stats = await self.guest.agent.stats(self.container_id)
            return self._stats
        cgroup = self._stats.cgroup_stats = self._stats.cgroup_stats or CgroupStats()
        memory = cgroup.memory_stats = cgroup.memory_stats or MemoryStats()
        memory.stats[OOM_KILLS] = max(memory.stats.get(OOM_KILLS, 0), self._oom_kills)
        return self._stats

    def note_oom(self) -> None:
        """Note, and tell, that its memory ran out."""
        self._oom_kills += 1
        self._events.publish(events.TaskOOM(container_id=self.container_id))

    def state(self, exec_id: str) -> State:
        """Return the state that a client sees: a paused container's execs are paused as well.

        Raises:
            NotFoundError: there is no such exec.
        """
        own, init = self.process(exec_id).process.state, self._init.process.state
        return init if own is State.RUNNING and init in HALTED else own

    async def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that does not run; return its record."""
        target = self.process(exec_id)
        target.process.check(Ask.DELETE)
        del self._task.execs[exec_id], self._execs[exec_id], self._exec_specs[exec_id]
        await target.discard()
        return target.process

    async def forget(self) -> Process:
        """Wait for the end of the container, whose VM has ended or is about to, and give up all it holds."""
        await self._init.exited.wait()
        for process in (self._init, *self._execs.values()):
            await process.discard()
        await self._hooks.stopped()
        record = self._init.process
        self._events.publish(
            events.TaskDelete(
                container_id=self.container_id,
                pid=self.guest.pid,
                exit_status=record.exit_status,
                exited_at=Timestamp.from_ns(record.exited_at_ns),
                id="",
            )
        )
        return record

    def lose(self) -> None:
        """Note that the VM has ended: what was not started never will be."""
        for process in self._execs.values():
            process.lose()

    async def _begin_exec(self, exec_id: str, target: GuestProcess) -> None:
        numbers = await target.connect()
        await self.guest.agent.exec_process(self.container_id, exec_id, self._exec_specs[exec_id], numbers)

    def _live_execs(self) -> Iterator[GuestProcess]:
        for process in list(self._execs.values()):
            if process.process.state in (State.STARTING, State.RUNNING):
                yield process
