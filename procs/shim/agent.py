"""The guest's agent: Kata's agent protocol over ttrpc, on a connection that the channel makes.

Whatever the agent answers is the guest's word and treated as such: :mod:`common.protobuf` bounds and checks it.
"""

from __future__ import annotations

import asyncio
import stat
from typing import TYPE_CHECKING, TypeVar

from common import log
from common.channel import MAX_CHUNK
from common.errors import GuestError, KataError
from common.protocols import agent, guest
from common.protocols.stats import StatsContainerResponse
from common.ttrpc.client import TtrpcClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.protobuf import Message
    from common.protocols import oci
    from procs.shim.channel import Channel
    from procs.shim.copies import Copy
    from procs.shim.ports import ProcessName
    from procs.shim.streams import StreamNumbers

M = TypeVar("M", bound="Message")

RELEASE_TIMEOUT_S = 10
"""How long the guest may take to let go of a disk that it could not use."""

CALL_TIMEOUT_S = 60
"""For a call that the guest answers at once, on a host that is loaded beyond reason (upstream's figure)."""

_PIECE = 512 << 10
"""Bytes of a file that one message carries; a message may have 4 MiB (``common.ttrpc``)."""


class Agent:
    """Calls the guest's agent. Every call carries the request id of containerd's call that it serves.

    Attributes:
        features: what it can do beyond what all agents can, once it was checked.
    """

    def __init__(self, client: TtrpcClient) -> None:
        self._client = client
        self.features: frozenset[str] = frozenset()

    @classmethod
    async def connect(cls, channel: Channel) -> Agent:
        """Wait for the agent and connect to it; see :meth:`procs.shim.channel.Channel.connect_agent`."""
        sock = await channel.connect_agent()
        try:
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: TtrpcClient("the guest's agent"), sock=sock
            )
        except BaseException:
            sock.close()
            raise
        return cls(client)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    async def check(self) -> None:
        """Ask the agent whether it serves and, in the same round, what it can do beyond what all of them can.

        Raises:
            GuestError: it says no.
        """
        health, details = await asyncio.gather(
            self._client.call(
                agent.HEALTH_SERVICE,
                "Check",
                agent.CheckRequest(service=""),
                agent.HealthCheckResponse,
                timeout_s=CALL_TIMEOUT_S,
            ),
            self._ask("GetGuestDetails", agent.GuestDetailsRequest(), agent.GuestDetailsResponse, CALL_TIMEOUT_S),
        )
        if health.status != agent.SERVING:
            raise GuestError(f"the guest's agent answers but does not serve (health status {health.status})")
        self.features = frozenset(details.agent_details.extra_features if details.agent_details else ())

    async def create_sandbox(
        self, sandbox_id: str, hostname: str, guest_hook_path: str, *, is_shared: bool = True
    ) -> None:
        """Have the guest prepare for containers.

        Args:
            sandbox_id: whose guest it is.
            hostname: its name.
            guest_hook_path: where its image has hooks for containers, or empty.
            is_shared: whether there is a share, which it mounts.
        """
        share = agent.Storage(
            driver="virtio-fs",
            driver_options=[],
            source=agent.SHARE_TAG,
            fstype="virtiofs",
            options=[],
            mount_point=agent.SHARE_MOUNT_POINT,
        )
        request = agent.CreateSandboxRequest(
            hostname=hostname,
            storages=[share] if is_shared else [],
            sandbox_id=sandbox_id,
            guest_hook_path=guest_hook_path,
        )
        await self._call("CreateSandbox", request)

    async def destroy_sandbox(self, timeout_s: float) -> None:
        """Have the guest end all processes, unmount and sync."""
        await self._call("DestroySandbox", agent.Empty(), timeout_s)

    async def create_container(
        self,
        container_id: str,
        spec: oci.Spec,
        streams: StreamNumbers,
        timeout_s: float,
        *,
        storages: Sequence[agent.Storage],
        devices: Sequence[agent.Device],
    ) -> None:
        """Have the guest mount a container's storages, find its devices and prepare it."""
        resources = spec.linux.resources if spec.linux else None
        if resources and resources.block_io and agent.DISK_LIMITS_FEATURE not in self.features:
            log.get().warning("the agent does not know how fast disks may be used, limits are left out")
            resources.block_io = None
        request = agent.CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,
            devices=list(devices),
            storages=list(storages),
            oci=spec,
            stdin_port=streams.stdin,
            stdout_port=streams.stdout,
            stderr_port=streams.stderr,
        )
        await self._call("CreateContainer", request, timeout_s)

    async def release_disk(self, disk: agent.Storage) -> bool:
        """Have the guest let go of a disk that is no container's; return whether it says that it has."""
        if agent.RELEASE_DISKS_FEATURE not in self.features:
            return False
        try:
            await self._call("ReleaseDisks", agent.ReleaseDisksRequest(disks=[disk]), RELEASE_TIMEOUT_S)
        except KataError as err:
            log.get().warning("the guest does not say that it has let go of a disk", disk=disk.source, error=str(err))
            return False
        return True

    async def copy(self, copy: Copy) -> None:
        """Have the guest make a file, directory or symbolic link, in pieces that a message holds."""
        pieces = range(0, len(copy.data), _PIECE) if stat.S_ISREG(copy.mode) else ()
        for offset in pieces or (0,):
            request = guest.CopyFileRequest(
                path=copy.path,
                file_size=len(copy.data),
                file_mode=copy.mode,
                dir_mode=0o755,
                uid=copy.uid,
                gid=copy.gid,
                offset=offset,
                data=copy.data[offset : offset + _PIECE],
            )
            await self._call("CopyFile", request)

    async def exec_process(self, container_id: str, exec_id: str, process: oci.Process, streams: StreamNumbers) -> None:
        """Have the guest start a further process."""
        request = agent.ExecProcessRequest(
            container_id=container_id,
            exec_id=exec_id,
            process=process,
            stdin_port=streams.stdin,
            stdout_port=streams.stdout,
            stderr_port=streams.stderr,
        )
        await self._call("ExecProcess", request)

    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None:
        """Send a signal; an empty ``exec_id`` means every process of the container."""
        request = agent.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        await self._call("SignalProcess", request)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        """Wait until a process has ended, for ever; return its exit status."""
        request = agent.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        return (await self._ask("WaitProcess", request, agent.WaitProcessResponse)).status & 0xFF

    async def read_stream(self, method: str, process: ProcessName) -> bytes:
        """Wait for output of a process, for ever, and return it; ``method`` is ``ReadStdout`` or ``ReadStderr``."""
        request = agent.ReadStreamRequest(container_id=process.container_id, exec_id=process.exec_id, len=MAX_CHUNK)
        return (await self._ask(method, request, agent.ReadStreamResponse)).data[:MAX_CHUNK]

    async def tell_taken(self, stream: int, size: int) -> None:
        """Say that so much more of a stream's output was handed on: our own agent sends more then."""
        request = agent.TakenRequest(stream=stream, size=size)
        await self._client.call(agent.STREAMS_SERVICE, "Taken", request, agent.Empty, timeout_s=CALL_TIMEOUT_S)

    async def write_stdin(self, process: ProcessName, data: bytes) -> None:
        """Write to a process's standard input; returns when it has taken all."""
        request = agent.WriteStreamRequest(container_id=process.container_id, exec_id=process.exec_id, data=data)
        await self._ask("WriteStdin", request, agent.WriteStreamResponse)

    async def close_stdin(self, process: ProcessName) -> None:
        """Let a process's standard input end."""
        request = agent.CloseStdinRequest(container_id=process.container_id, exec_id=process.exec_id)
        await self._call("CloseStdin", request)

    async def resize(self, container_id: str, exec_id: str, *, rows: int, columns: int) -> None:
        """Set the size of a process's terminal."""
        request = agent.TtyWinResizeRequest(container_id=container_id, exec_id=exec_id, row=rows, column=columns)
        await self._call("TtyWinResize", request)

    async def call_container(self, method: str, container_id: str) -> None:
        """Call a method that is only told which container: Start-, Pause- and ResumeContainer."""
        await self._call(method, agent.ContainerRequest(container_id=container_id))

    async def stats(self, container_id: str) -> StatsContainerResponse:
        """Ask what a container has used."""
        request = agent.ContainerRequest(container_id=container_id)
        return await self._ask("StatsContainer", request, StatsContainerResponse, CALL_TIMEOUT_S)

    async def update_container(self, container_id: str, resources: oci.LinuxResources) -> None:
        """Change a container's limits."""
        request = agent.UpdateContainerRequest(container_id=container_id, resources=resources)
        await self._call("UpdateContainer", request)

    async def next_oom(self) -> str:
        """Wait until a container has run out of memory, for ever; return what the guest says is its id."""
        return (await self._ask("GetOOMEvent", agent.Empty(), agent.OomEvent)).container_id

    async def _call(self, method: str, request: Message, timeout_s: float = CALL_TIMEOUT_S) -> None:
        await self._ask(method, request, agent.Empty, timeout_s)

    async def _ask(self, method: str, request: Message, reply: type[M], timeout_s: float | None = None) -> M:
        return await self._client.call(
            agent.AGENT_SERVICE, method, request, reply, timeout_s=timeout_s, metadata=_metadata()
        )


def _metadata() -> dict[str, str]:
    return {"request-id": log.request_id.get()}
