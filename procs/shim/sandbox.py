"""The sandbox: one VM, from the request for it to its confirmed end.

*Boot* begins when the shim does, before containerd asks for anything (docs/adr/0004-boot-begins-at-start.md). It has
phases, and a failure says in which one it was, with what the VM printed last; it is kept and answered at Create, where
a client sees it.

*Death* is known from the VMM's pidfd and from nobody else; so it is known when every service is down.

*The end*: the agent ends all processes, unmounts and syncs; the VM manager destroys the VM, which is the confirmed
removal of its devices; then the host's mounts go. If the manager does not answer we kill the sandbox's cgroup
ourselves, and the services find out by themselves.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import log
from common.errors import GuestError, KataError, UnavailableError
from common.linux import identity
from common.services import vmm
from procs.shim.order import Order

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from common.bus.client import BusClient
    from common.config import KataConfig
    from common.protocols.task import Mount
    from common.services.vmm import Vm
    from procs.shim.agent import Agent
    from procs.shim.channel import Channel
    from procs.shim.devices import Devices
    from procs.shim.ports import Ports
    from procs.shim.spec import HostMount

DESTROY_TIMEOUT_S = 5
DESCRIBE_TIMEOUT_S = 2
GUEST_STOP_TIMEOUT_S = 3
"""How long the guest may take to end itself; what it does not sync in this time is its own loss."""

_MAX_WORDS = 2000
"""Characters of what a VM printed that are logged: a line goes into containerd's pipe as a whole or not at all."""

_PANIC = "Kernel panic - not syncing"
"""How Linux begins to say why it panics (kernel/panic.c)."""

_log = log.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A guest that is ready for containers.

    Attributes:
        sandbox_id: whose it is.
        agent: its agent.
        devices: how it gets more.
        ports: where processes get their streams.
        pid: the VMM's process, which containerd takes for every process of the sandbox.
        is_gone: set when the VMM has ended.
        create_timeout_s: how long the guest may take to prepare a container.
        end: ends the VM, whatever the guest does.
    """

    sandbox_id: str
    agent: Agent
    devices: Devices
    ports: Ports
    pid: int
    is_gone: asyncio.Event
    create_timeout_s: int
    end: Callable[[], Awaitable[None]]


class Sandbox:
    """One VM and its guest.

    Attributes:
        sandbox_id: whose.
        is_gone: set when the VMM has ended, for whatever reason.
        is_shareable: set when file systems may be mounted for the guest.
    """

    def __init__(self, sandbox_id: str, order: Order | KataError, bus: BusClient) -> None:
        self.sandbox_id = sandbox_id
        self.is_gone = asyncio.Event()
        self.is_shareable = asyncio.Event()
        self._bus = bus
        self._order = order
        self._vm: Vm | None = None
        self._agent: Agent | None = None
        self._guest: Guest | None = None
        self._phase = "reading the configuration"
        self._boot: asyncio.Task[None] | None = None
        self._failure: KataError | None = None
        self._is_booted = asyncio.Event()
        self._is_stopping = False
        self._is_stopped = asyncio.Event()
        self._mounting = asyncio.Lock()

    async def boot(self) -> None:
        """Start the VM and make the guest ready for containers. A failure is kept for :meth:`wait_booted`."""
        self._boot = asyncio.current_task()
        request = self._order.early.request_id if isinstance(self._order, Order) else ""
        with log.bound(request=request):
            await self._boot_or_fail()
        if self._failure:
            await self.stop()

    async def _boot_or_fail(self) -> None:
        try:
            if isinstance(self._order, KataError):
                raise self._order
            self._guest = await self._run_phases(self._order)
            _log.info("sandbox booted", vmm_pid=self._guest.pid)
        except (KataError, OSError) as err:
            cause = (
                err if isinstance(err, KataError) else GuestError(f"the connection to the guest broke: {err.strerror}")
            )
            self._failure = await self._explain(cause)
            _log.error("sandbox failed", phase=self._phase, error=str(self._failure))
        finally:
            self._is_booted.set()
            self.is_shareable.set()

    async def wait_shareable(self) -> KataConfig:
        """Wait until file systems may be mounted for the guest, which may not have booted yet.

        Returns:
            The configuration that holds for its containers.

        Raises:
            KataError: the sandbox failed.
        """
        await self.is_shareable.wait()
        if self._failure:
            raise self._failure
        assert isinstance(self._order, Order), "an order that could not be made is a failure"
        return self._order.config

    async def mount(self, container_id: str, rootfs: Sequence[Mount], host: Sequence[HostMount]) -> None:
        """Mount what a container is made of, for the guest to find.

        Raises:
            KataError: something cannot be mounted, or the sandbox ends; nothing stays mounted.
        """
        from procs.shim import share

        async with self._mounting:
            if self._is_stopping:
                raise self._failure or self._stopped()
            await share.add_container(self.sandbox_id, container_id, rootfs, host)

    async def wait_booted(self) -> Guest:
        """Wait until containers may be created.

        Raises:
            KataError: the sandbox failed: phase, cause, remedy.
        """
        await self._is_booted.wait()
        if self._guest is None:
            raise self._failure or self._stopped()
        return self._guest

    def _stopped(self) -> UnavailableError:
        return UnavailableError(f"sandbox {self.sandbox_id} was stopped while {self._phase}")

    async def stop(self) -> None:
        """End the VM and unmount all that was mounted for it. Returns when that is done, whoever asked first."""
        if not self._is_stopping:
            self._is_stopping = True
            try:
                await self._stop()
            finally:
                self._is_stopped.set()
        await self._is_stopped.wait()

    async def _run_phases(self, order: Order) -> Guest:
        config = order.config
        self._tell_configuration(config)
        self._enter("starting the VM")
        vm = await self._create_vm(order)
        self._watch(vm)
        devices, share = self._devices(vm), None
        if order.wish.is_held:
            self._enter("plugging devices of the host")
            await self._boot_with(order, devices)
        self._enter("preparing the share")
        self._prepare(config)
        if config.hypervisor.can_share:
            self._enter("plugging the share")
            share = await devices.plug(self._share_spec(), use_s=config.agent.dial_timeout)  # while the guest boots
        self._enter("waiting for the guest's agent")
        channel = self._channel(vm)
        self._agent = agent = await self._dial(channel, config)
        ports = self._ports(channel, agent)
        self._enter("sharing the file system")
        hook_path = config.hypervisor.guest_hook_path
        async with devices.taken_into_use(share) if share else nullcontext():
            await agent.create_sandbox(self.sandbox_id, self.sandbox_id, hook_path, is_shared=share is not None)
        self._enter("running")
        return Guest(
            sandbox_id=self.sandbox_id,
            agent=agent,
            devices=devices,
            ports=ports,
            pid=vm.process.pid,
            is_gone=self.is_gone,
            create_timeout_s=config.runtime.create_container_timeout,
            end=self.stop,
        )

    def _enter(self, phase: str) -> None:
        _log.info("sandbox phase", phase=phase)
        self._phase = phase

    def _tell_configuration(self, config: KataConfig) -> None:
        _log.info("configuration", path=config.source)
        if config.ignored:
            _log.warning("configuration keys ignored", path=config.source, keys=list(config.ignored))

    async def _create_vm(self, order: Order) -> Vm:
        """Ask for the VM again, now that the answer can be waited for."""
        try:
            return await self._bus.call(
                order.service, vmm.CREATE_VM, order.wish, timeout_s=vmm.CREATE_TIMEOUT_S, call_id=order.early.call_id
            )
        finally:
            order.early.close()

    async def _boot_with(self, order: Order, devices: Devices) -> None:
        """Plug what the guest is to boot with, and let it boot. The container asks for the same again, and confirms."""
        use_s = order.config.agent.dial_timeout + order.config.runtime.create_container_timeout
        for function in order.functions:
            await devices.plug(function, holder=self.sandbox_id, use_s=use_s)
        ref = vmm.SandboxRef(sandbox_id=self.sandbox_id)
        await self._bus.call(order.service, vmm.RESUME_VM, ref, timeout_s=vmm.CREATE_TIMEOUT_S)

    def _watch(self, vm: Vm) -> None:
        """Learn of the VMM's end from the kernel."""
        self._vm = vm
        fd = identity.open_pidfd(vm.process.pid, vm.process.start_time)
        if fd is None:
            self.is_gone.set()
        else:
            asyncio.get_running_loop().add_reader(fd, self._note_end, fd)

    def _note_end(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        _log.info("VMM ended")
        self.is_gone.set()

    def _prepare(self, config: KataConfig) -> None:
        """Make what the guest does not take part in, while it boots. Imported late: the VM is on its way first."""
        if config.hypervisor.can_share:
            from procs.shim import share

            share.prepare(self.sandbox_id)
        self.is_shareable.set()

    async def _dial(self, channel: Channel, config: KataConfig) -> Agent:
        from procs.shim.agent import Agent

        limit, section = config.agent.dial_timeout, config.hypervisor
        try:
            async with asyncio.timeout(limit):
                agent = await Agent.connect(channel)
                await agent.check()
        except (UnavailableError, ConnectionError) as err:
            raise GuestError(
                "the guest ended before its agent answered",
                hint=f"see the console above for the cause; the VM boots kernel {section.kernel}, initrd "
                f"{section.initrd} and kernel_params {section.kernel_params!r} of {config.source}",
            ) from err
        except TimeoutError as err:
            raise GuestError(
                f"the guest's agent did not answer within {limit} s",
                hint=f"see the console above for the cause, or raise agent.kata.dial_timeout in {config.source}",
            ) from err
        return agent

    def _channel(self, vm: Vm) -> Channel:
        from procs.shim.channel import open_channel

        return open_channel(vm.channel)

    def _ports(self, channel: Channel, agent: Agent) -> Ports:
        """Return where processes get their streams: the channel's ports, if the agent has them too."""
        from common.protocols.agent import STREAM_PORTS_FEATURE

        if STREAM_PORTS_FEATURE in agent.features:
            channel.ports.tell_taken = agent.tell_taken
            return channel.ports
        from procs.shim.calls import CallPorts

        _log.info("the agent has no stream ports, streams are calls")
        return CallPorts(agent)

    def _devices(self, vm: Vm) -> Devices:
        from procs.shim.devices import Devices

        return Devices(self._bus, vm)

    def _share_spec(self) -> vmm.ShareSpec:
        from common import paths
        from common.protocols.agent import SHARE_TAG

        return vmm.ShareSpec(source=paths.share_dir(self.sandbox_id), tag=SHARE_TAG)

    async def _explain(self, err: KataError) -> KataError:
        """Return the error as a client should see it: whose, in which phase, and what the VM printed last."""
        text = f"sandbox {self.sandbox_id} failed while {self._phase}: {err.message}"
        if self._vm is not None:
            text += await self._last_words(self._vm)
        return type(err)(text, hint=err.hint, **err.context)

    async def _last_words(self, vm: Vm) -> str:
        ref = vmm.SandboxRef(sandbox_id=self.sandbox_id)
        try:
            service = vmm.service_name(vm.hypervisor)
            status = await self._bus.call(service, vmm.DESCRIBE_VM, ref, timeout_s=DESCRIBE_TIMEOUT_S)
        except KataError as err:
            return f"; what the VM printed is not known: {err.message}"
        state = status.runstate if status.is_running else "ended"
        parts = [f"; the VM is {state}"]
        for name, tail in (("console", status.console_tail), (vm.hypervisor, status.log_tail)):
            if tail.strip():
                parts.append(f"; last lines of {name}:\n{tail.rstrip()}\n")
        return "".join(parts)

    async def _tell_end(self, vm: Vm) -> None:
        """Log what a VM printed that ended by itself: the guest's kernel says on its console why it panics."""
        said = await self._last_words(vm)
        panic = said.rfind(_PANIC)  # behind it are registers and a trace, which may be longer than what is logged
        _log.error("the VM ended by itself", said=said[panic:][:_MAX_WORDS] if panic >= 0 else said[-_MAX_WORDS:])

    async def _stop(self) -> None:
        if self._vm is not None and self.is_gone.is_set() and self._failure is None:
            await self._tell_end(self._vm)
        if self._boot is not None and not self._is_booted.is_set():
            if not self.is_gone.is_set():  # else it fails by itself, and knows why
                self._boot.cancel()
            await self._is_booted.wait()
        spent: dict[str, float] = {}
        if self._agent is not None:
            await _timed(spent, "ending the guest", self._stop_guest(self._agent))
        if isinstance(self._order, Order):
            await _timed(spent, "destroying the VM", self._destroy_vm(self._order.service))
        await _timed(spent, "unmounting", self._unmount())
        _log.info("sandbox stopped", seconds=spent)

    async def _unmount(self) -> None:
        from common import paths
        from common.linux import mounts

        async with self._mounting:
            await asyncio.to_thread(mounts.unmount_below, paths.sandbox_dir(self.sandbox_id))

    async def _stop_guest(self, agent: Agent) -> None:
        if not self.is_gone.is_set():
            try:
                await agent.destroy_sandbox(GUEST_STOP_TIMEOUT_S)
            except KataError as err:
                _log.warning("guest did not end itself", error=str(err))
        agent.close()

    async def _destroy_vm(self, service: str) -> None:
        from procs.shim import cleanup

        ref = vmm.SandboxRef(sandbox_id=self.sandbox_id)
        try:
            await self._bus.call(service, vmm.DESTROY_VM, ref, timeout_s=DESTROY_TIMEOUT_S)
        except KataError as err:
            _log.warning("VM manager did not destroy the VM, killing it", error=str(err))
            await asyncio.to_thread(cleanup.kill_vm, self.sandbox_id)
        if self._vm is not None:
            await self.is_gone.wait()


async def _timed(spent: dict[str, float], phase: str, work: Awaitable[None]) -> None:
    """Await something and note how many seconds it took."""
    clock = asyncio.get_running_loop().time
    began = clock()
    await work
    spent[phase] = round(clock() - began, 3)
