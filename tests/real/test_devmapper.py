"""Disks of a thin pool come and go, quickly and again, on a real Cloud Hypervisor: each is free when it is said to be.

That is what containers and volumes of containerd's devmapper snapshotter need: the snapshot is removed as soon as the
runtime says that it has given the device back, and device-mapper refuses that while anybody has it open.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING

from common.channel import AGENT_VSOCK_PORT, NO_STREAM
from common.protocols.agent import (
    CONTAINERS_DIRECTORY,
    CreateContainerRequest,
    Empty,
    RemoveContainerRequest,
    Storage,
)
from common.services.channel import HybridVsock
from common.services.vmm import BlockSpec
from common.testing.agent_client import AgentClient
from common.testing.guest_sandbox import container_spec
from common.testing.hotplug_stand import plugging_into
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import RealCloudHypervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.services.device import Device
    from common.services.vmm import Vm
    from common.testing.thin_pool import ThinPool

ROUNDS = int(os.environ.get("PYKATA_TEST_ROUNDS", "200"))
_CALL_TIMEOUT_S = 120


def agent_of(vm: Vm) -> AgentClient:
    """Connect to a guest's agent."""
    assert isinstance(vm.channel, HybridVsock)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_CALL_TIMEOUT_S)
    connection.connect(vm.channel.socket)
    connection.sendall(f"CONNECT {AGENT_VSOCK_PORT}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        answer += connection.recv(1)
    assert answer.startswith(b"OK "), answer
    return AgentClient(connection)


def create(agent: AgentClient, disk: Device, container_id: str) -> None:
    """Have the guest mount a disk for a container."""
    storage = Storage(
        driver="blk",
        driver_options=[f"serial={disk.serial}"],
        source=disk.guest_path,
        fstype="ext4",
        mount_point=f"{CONTAINERS_DIRECTORY}/{container_id}/rootfs",
    )
    spec = container_spec(storage.mount_point, "true")
    request = CreateContainerRequest(
        container_id=container_id,
        exec_id=container_id,
        storages=[storage],
        oci=spec,
        stdin_port=NO_STREAM,
        stdout_port=NO_STREAM,
        stderr_port=NO_STREAM,
    )
    agent.ask("CreateContainer", request, Empty)


@in_event_loop
async def test_thin_disks_are_mounted_given_back_and_removed_at_once(
    pool: ThinPool, record_property: Callable[[str, object], None]
) -> None:
    """Every round has a new disk under the same name, as a container that starts again has."""
    took = []
    async with plugging_into(RealCloudHypervisor) as stand:
        with agent_of(stand.vm) as agent:
            for number in range(ROUNDS):
                began = time.monotonic()
                spec = BlockSpec(source=pool.snapshot("root"))
                disk = await stand.devices.attach(spec=spec, holder="c1")
                await asyncio.to_thread(create, agent, disk, f"c{number}")
                await stand.devices.confirm(disk, "c1")
                gone = RemoveContainerRequest(container_id=f"c{number}")
                await asyncio.to_thread(agent.ask, "RemoveContainer", gone, Empty)
                await stand.devices.detach(disk, "c1")
                pool.remove("root")
                took.append(time.monotonic() - began)
        assert await stand.vmm.has() == (set(), set())
        assert await stand.devices.list() == ()
    assert pool.disks() == []
    took.sort()
    said = f"{ROUNDS} rounds, none refused: median {took[ROUNDS // 2]:.2f} s, longest {took[-1]:.2f} s"
    record_property("rounds", said)
    print(said)  # noqa: T201 - for who runs it by hand
