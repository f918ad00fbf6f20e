"""``grpc.AgentService``: the verbs that this version of the agent answers."""

from __future__ import annotations

from common import status
from common.protocols import agent as messages
from guest.agent import devices, storage
from guest.agent.container import Container
from guest.agent.crun import Crun
from guest.agent.files import has_file, read_text
from guest.agent.health import VERSION
from guest.agent.process import Guest, Process, Streams
from guest.agent.reaper import Reaper
from guest.agent.rpc import RpcError
from guest.agent.sandbox import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from common.protobuf import Message
    from guest.agent.passed import Passed
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call, Methods
    from guest.agent.streams import StreamPorts

_MAX_SIGNAL = 64


def methods(reactor: Reactor, uevents: Uevents, streams: StreamPorts) -> Methods:
    """Return the service's methods."""
    reaper = Reaper(reactor)
    guest = Guest(reactor, reaper, Crun(reaper), streams)
    return Service(Sandbox(guest, uevents)).methods()


class Service:
    """One method per verb: finds what the request names and passes it on."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def methods(self) -> Methods:
        """Return the verbs by name."""
        return {
            "CreateSandbox": (messages.CreateSandboxRequest, self.create_sandbox),
            "DestroySandbox": (messages.Empty, self.destroy_sandbox),
            "GetGuestDetails": (messages.GuestDetailsRequest, self.get_guest_details),
            "CreateContainer": (messages.CreateContainerRequest, self.create_container),
            "StartContainer": (messages.ContainerRequest, self.start_container),
            "PauseContainer": (messages.ContainerRequest, self.pause_container),
            "ResumeContainer": (messages.ContainerRequest, self.resume_container),
            "UpdateContainer": (messages.UpdateContainerRequest, self.update_container),
            "StatsContainer": (messages.ContainerRequest, self.stats_container),
            "GetOOMEvent": (messages.Empty, self.get_oom_event),
            "RemoveContainer": (messages.RemoveContainerRequest, self.remove_container),
            "ReleaseDisks": (messages.ReleaseDisksRequest, self.release_disks),
            "ExecProcess": (messages.ExecProcessRequest, self.exec_process),
            "SignalProcess": (messages.SignalProcessRequest, self.signal_process),
            "WaitProcess": (messages.WaitProcessRequest, self.wait_process),
            "WriteStdin": (messages.WriteStreamRequest, self.write_stdin),
            "CloseStdin": (messages.CloseStdinRequest, self.close_stdin),
            "ReadStdout": (messages.ReadStreamRequest, self.read_stdout),
            "ReadStderr": (messages.ReadStreamRequest, self.read_stderr),
            "TtyWinResize": (messages.TtyWinResizeRequest, self.tty_win_resize),
        }

    def create_sandbox(self, request: messages.CreateSandboxRequest, call: Call) -> None:
        """Name the guest, load modules for its kernel, and mount what is shared with it."""
        if request.hostname:
            self._sandbox.set_hostname(request.hostname)

        self._sandbox.guest.hook_path = request.guest_hook_path
        if request.kernel_modules:
            from guest.agent import modprobe

            modprobe.load(request.kernel_modules)
        if request.dns:
            self._sandbox.set_dns(request.dns)

        def done(error: str) -> None:
            if error:
                call.fail(status.UNAVAILABLE, error)
            else:
                call.reply(messages.Empty())

        storage.check(request.storages)
        self._sandbox.mount(request.storages, done)

    def destroy_sandbox(self, _request: messages.Empty, call: Call) -> None:
        """End everything; the host ends the VM next."""
        self._sandbox.destroy(lambda: call.reply(messages.Empty()))

    def get_guest_details(self, request: messages.GuestDetailsRequest, _call: Call) -> messages.GuestDetailsResponse:
        """Say what this agent is."""
        details = messages.AgentDetails(
            version=VERSION,
            init_daemon=True,
            device_handlers=[*devices.TYPES, messages.GUEST_DRIVEN],
            storage_handlers=list(storage.DRIVERS),
            supports_seccomp=True,
            extra_features=[
                messages.STREAM_PORTS_FEATURE,
                messages.DISK_LIMITS_FEATURE,
                messages.RELEASE_DISKS_FEATURE,
            ],
        )
        block_size = read_text("/sys/devices/system/memory/block_size_bytes") if request.mem_block_size else ""
        return messages.GuestDetailsResponse(
            agent_details=details,
            mem_block_size_bytes=int(block_size or "0", 16),
            support_mem_hotplug_probe=request.mem_hotplug_probe and has_file("/sys/devices/system/memory/probe"),
        )

    def create_container(self, request: messages.CreateContainerRequest, call: Call) -> None:
        """Check the request, find its devices, mount its storages and write the bundle; nothing is started."""
        container_id = request.container_id
        spec = request.oci
        if spec is None or spec.root is None or spec.process is None or not spec.process.args:
            raise RpcError(status.INVALID_ARGUMENT, f"container {container_id}: specification without root or process")
        groups = [device for device in request.devices if device.type == messages.GUEST_DRIVEN]
        disks = [device for device in request.devices if device.type != messages.GUEST_DRIVEN]
        nodes = devices.as_storages(container_id, disks, spec)
        storages = [*request.storages, *nodes]
        storage.check(storages)
        streams = _streams(request, is_terminal=spec.process.terminal)

        passed = _passed(groups) if groups else None

        def make() -> Container:
            devices.renumber(spec, disks, nodes)
            devices.allow(spec, request.storages)
            if passed:
                passed.rename(spec)
            return Container(self._sandbox.guest, container_id, spec, streams)

        self._sandbox.create(container_id, storages, passed, make, call)

    def start_container(self, request: messages.ContainerRequest, call: Call) -> None:
        """Start the container's first process."""
        self._sandbox.container(request.container_id).start(call)

    def pause_container(self, request: messages.ContainerRequest, call: Call) -> None:
        """Have all processes of a container stand still."""
        self._sandbox.container(request.container_id).freeze(call, is_frozen=True)

    def resume_container(self, request: messages.ContainerRequest, call: Call) -> None:
        """Let them go on."""
        self._sandbox.container(request.container_id).freeze(call, is_frozen=False)

    def update_container(self, request: messages.UpdateContainerRequest, call: Call) -> None:
        """Change a container's limits."""
        container = self._sandbox.container(request.container_id)
        if request.resources is None:
            raise RpcError(status.INVALID_ARGUMENT, f"container {container.id}: an update without resources")
        container.update(request.resources, call)

    def stats_container(self, request: messages.ContainerRequest, _call: Call) -> Message:
        """Say what a container has used."""
        return self._sandbox.container(request.container_id).stats()

    def get_oom_event(self, _request: messages.Empty, call: Call) -> None:
        """Answer when a container has run out of memory."""
        self._sandbox.guest.oom.wait(call)

    def remove_container(self, request: messages.RemoveContainerRequest, call: Call) -> None:
        """Remove a container, whatever it does."""
        self._sandbox.remove(request.container_id, call)

    def release_disks(self, request: messages.ReleaseDisksRequest, _call: Call) -> messages.Empty:
        """Let go of disks that are no container's after all."""
        self._sandbox.release_disks(request.disks)
        return messages.Empty()

    def exec_process(self, request: messages.ExecProcessRequest, call: Call) -> None:
        """Start another process in a container."""
        container = self._sandbox.container(request.container_id)
        if request.process is None or not request.process.args or not request.exec_id:
            raise RpcError(status.INVALID_ARGUMENT, f"exec in container {container.id}: no process or no id")
        streams = _streams(request, is_terminal=request.process.terminal)
        container.exec(request.exec_id, request.process, streams, call)

    def signal_process(self, request: messages.SignalProcessRequest, _call: Call) -> messages.Empty:
        """Send a signal to a process, or to all of a container."""
        container = self._sandbox.container(request.container_id)
        if not 1 <= request.signal <= _MAX_SIGNAL:
            raise RpcError(status.INVALID_ARGUMENT, f"{request.signal} is not a signal")
        if request.exec_id:
            container.process(request.exec_id).signal(request.signal)
        else:
            container.signal_all(request.signal)
        return messages.Empty()

    def wait_process(self, request: messages.WaitProcessRequest, call: Call) -> None:
        """Answer when a process has ended."""
        self._sandbox.container(request.container_id).wait(request.exec_id, call)

    def write_stdin(self, request: messages.WriteStreamRequest, call: Call) -> None:
        """Answer when a process has taken some input."""
        self._process(request).called_input.write(request.data, call)

    def close_stdin(self, request: messages.CloseStdinRequest, call: Call) -> None:
        """Let a process's standard input end."""
        self._process(request).called_input.end(call)

    def read_stdout(self, request: messages.ReadStreamRequest, call: Call) -> None:
        """Answer when a process has written to its standard output or terminal."""
        self._process(request).read(0, request.len, call)

    def read_stderr(self, request: messages.ReadStreamRequest, call: Call) -> None:
        """Answer when a process has written to its standard error."""
        self._process(request).read(1, request.len, call)

    def _process(
        self, request: messages.WriteStreamRequest | messages.CloseStdinRequest | messages.ReadStreamRequest
    ) -> Process:
        return self._sandbox.container(request.container_id).process(request.exec_id)

    def tty_win_resize(self, request: messages.TtyWinResizeRequest, _call: Call) -> messages.Empty:
        """Set the size of a process's terminal."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        process.resize(request.row, request.column)
        return messages.Empty()


def _passed(groups: list[messages.Device]) -> Passed:
    """Return the devices of groups. Few containers have any."""
    from guest.agent.passed import Passed

    return Passed(groups)


def _streams(request: messages.CreateContainerRequest | messages.ExecProcessRequest, *, is_terminal: bool) -> Streams:
    return Streams(request.stdin_port, request.stdout_port, request.stderr_port, is_terminal=is_terminal)
