"""Calls of upstream's shim that ours does not make, in a guest that has no share: its files are copied."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import status
from common.channel import NO_STREAM
from common.protocols.agent import (
    SHARE_MOUNT_POINT,
    ContainerRequest,
    CreateContainerRequest,
    CreateSandboxRequest,
    Empty,
    GuestDetailsRequest,
    GuestDetailsResponse,
    KernelModule,
    RemoveContainerRequest,
    Storage,
    WaitProcessRequest,
    WaitProcessResponse,
)
from common.protocols.guest import (
    BYTES,
    INODES,
    CopyFileRequest,
    MemHotplugByProbeRequest,
    Metrics,
    OnlineCPUMemRequest,
    ReseedRandomDevRequest,
    SetGuestDateTimeRequest,
    UpdateEphemeralMountsRequest,
    VolumeStatsRequest,
    VolumeStatsResponse,
)
from common.protocols.oci import Mount
from common.testing.agent_client import AgentClient, AgentError
from common.testing.guest_sandbox import container_spec
from common.testing.guest_vm import GuestVm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guest.image import Image

ROOT = f"{SHARE_MOUNT_POINT}/base/rootfs"
PIECE = 1 << 20
"""What upstream's shim sends at a time."""


@pytest.fixture(scope="module")
def vm(image: Image) -> Iterator[GuestVm]:
    with GuestVm(image.vmlinux, image.initrd) as running:
        yield running


@pytest.fixture(scope="module")
def agent(vm: GuestVm) -> Iterator[AgentClient]:
    with vm.connect() as client:
        put(client, f"{ROOT}/bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
        for name in ("dev", "proc", "run", "sys", "tmp"):
            copy(client, f"{ROOT}/{name}", mode=stat.S_IFDIR | 0o755)
        for name in ("sh", "cat", "date", "stat", "readlink", "ls"):
            copy(client, f"{ROOT}/bin/{name}", b"busybox", mode=stat.S_IFLNK | 0o777)
        yield client


def copy(client: AgentClient, path: str, data: bytes = b"", *, mode: int, size: int = 0, offset: int = 0) -> None:
    request = CopyFileRequest(path=path, file_size=size, file_mode=mode, dir_mode=0o755, offset=offset, data=data)
    client.ask("CopyFile", request, Empty)


def put(client: AgentClient, path: str, data: bytes, *, mode: int = 0o644) -> None:
    """Copy a file as upstream's shim does."""
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        copy(client, path, piece, mode=stat.S_IFREG | mode, size=len(data), offset=at)


def said(vm: GuestVm, client: AgentClient, script: str, *mounts: Mount, storages: Sequence[Storage] = ()) -> str:
    """Run a container from what was copied; return its output."""
    spec = container_spec(ROOT, "sh", "-c", script)
    spec.mounts = [mount for mount in spec.mounts if mount.destination not in {each.destination for each in mounts}]
    spec.mounts += mounts
    stream = vm.stream()
    request = CreateContainerRequest(
        container_id="c",
        oci=spec,
        storages=list(storages),
        stdin_port=NO_STREAM,
        stdout_port=stream.number,
        stderr_port=NO_STREAM,
    )
    try:
        client.ask("CreateContainer", request, Empty)
    except AgentError:
        stream.close()
        raise
    client.ask("StartContainer", ContainerRequest(container_id="c"), Empty)
    output = stream.read_all().decode()
    waiting = WaitProcessRequest(container_id="c", exec_id="c")
    assert client.ask("WaitProcess", waiting, WaitProcessResponse).status == 0
    client.ask("RemoveContainer", RemoveContainerRequest(container_id="c"), Empty)
    stream.close()
    return output


def test_a_container_of_copied_files(vm: GuestVm, agent: AgentClient) -> None:
    put(agent, f"{ROOT}/etc/motd", b"copied\n", mode=0o640)
    assert said(vm, agent, "cat /etc/motd; stat -c %a /etc/motd; readlink /bin/sh") == "copied\n640\nbusybox\n"


def test_memory_of_the_guest_for_dev_shm(vm: GuestVm, agent: AgentClient) -> None:
    """What upstream's shim has every sandbox make."""
    place = "/run/kata-containers/sandbox/shm"
    options = ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]
    shm = Storage(driver="ephemeral", source="shm", fstype="tmpfs", mount_point=place, options=options)
    agent.ask("CreateSandbox", CreateSandboxRequest(hostname="guest", sandbox_id="s", storages=[shm]), Empty)
    mount = Mount(destination="/dev/shm", source=place, type="bind", options=["rbind"])  # noqa: S108 - of the container
    mounted = said(vm, agent, "cat /proc/mounts", mount).splitlines()
    (seen,) = (line for line in mounted if " /dev/shm " in line)
    assert seen.startswith("shm /dev/shm tmpfs ")
    assert "size=65536k" in seen


def test_memory_of_the_guest_gets_another_size(vm: GuestVm, agent: AgentClient) -> None:
    place = "/run/kata-containers/sandbox/ephemeral/cache"
    cache = Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=place, options=["size=1m"])
    agent.ask("CreateSandbox", CreateSandboxRequest(sandbox_id="s", storages=[cache]), Empty)
    usages = []
    for size in (1, 2):
        cache.options = [f"size={size}m"]
        agent.ask("UpdateEphemeralMounts", UpdateEphemeralMountsRequest(storages=[cache]), Empty)
        stats = agent.ask("GetVolumeStats", VolumeStatsRequest(volume_guest_path=place), VolumeStatsResponse)
        usages.append(next(usage for usage in stats.usage if usage.unit == BYTES))
        assert next(usage for usage in stats.usage if usage.unit == INODES).used == 1, "its root directory"
    assert [(usage.total, usage.used, usage.available) for usage in usages] == [
        (1 << 20, 0, 1 << 20),
        (2 << 20, 0, 2 << 20),
    ]
    with pytest.raises(AgentError, match="volume /nothing: No such file or directory") as refused:
        agent.ask("GetVolumeStats", VolumeStatsRequest(volume_guest_path="/nothing"), VolumeStatsResponse)
    assert refused.value.code == status.NOT_FOUND


def test_a_directory_that_containers_share(vm: GuestVm, agent: AgentClient) -> None:
    """What upstream's shim has for an emptyDir."""
    place = "/run/kata-containers/local/volume"
    local = Storage(
        driver="local", source="local", fstype="local", mount_point=place, options=["mode=0750", "fsgid=77"]
    )
    mount = Mount(destination="/volume", source=place, type="bind", options=["rbind"])
    assert said(vm, agent, "stat -c '%a %g' /volume; echo kept > /volume/file", mount, storages=[local]) == "2750 77\n"
    assert said(vm, agent, "cat /volume/file", mount, storages=[local]) == "kept\n"
    local.options = ["mode=rwx"]
    with pytest.raises(AgentError, match=f"local storage {place}: invalid literal") as refused:
        said(vm, agent, "true", mount, storages=[local])
    assert refused.value.code == status.INVALID_ARGUMENT


def test_names_are_resolved_by_whom_the_host_says(vm: GuestVm, agent: AgentClient) -> None:
    agent.ask(
        "CreateSandbox", CreateSandboxRequest(sandbox_id="s", dns=["nameserver 192.0.2.1", " search a.example "]), Empty
    )
    mount = Mount(destination="/resolv", source="/etc/resolv.conf", type="bind", options=["rbind", "ro"])
    other = Mount(destination="/run", source="/run/kata-containers/sandbox", type="bind", options=["rbind", "ro"])
    expected = "nameserver 192.0.2.1\nsearch a.example\n"
    assert said(vm, agent, "cat /resolv /run/resolv.conf", mount, other) == expected * 2


def test_modules_are_loaded_with_what_they_need(vm: GuestVm, agent: AgentClient) -> None:
    """sd_mod needs scsi_mod and scsi_common, which this guest has not loaded."""
    listed = "cat /proc/modules"
    assert not {"sd_mod", "scsi_mod", "virtio_scsi"} & loaded(said(vm, agent, listed))
    wanted = [
        KernelModule(name="scsi-mod", parameters=["max_luns=7", "inq_timeout=5"]),
        KernelModule(name="sd_mod"),
        KernelModule(name="scsi_mod", parameters=["max_luns=8"]),
    ]
    agent.ask("CreateSandbox", CreateSandboxRequest(sandbox_id="s", kernel_modules=wanted), Empty)
    assert {"sd_mod", "scsi_mod"} <= loaded(said(vm, agent, listed))
    read = "cat /sys/module/scsi_mod/parameters/max_luns /sys/module/scsi_mod/parameters/inq_timeout"
    assert said(vm, agent, read) == "7\n5\n"


def loaded(listed: str) -> set[str]:
    return {line.split()[0] for line in listed.splitlines()}


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        (KernelModule(name="nothing"), status.NOT_FOUND, "the guest's image has no kernel module nothing"),
        (
            KernelModule(name="overlay", parameters=["redirect_max=many"]),
            status.INVALID_ARGUMENT,
            "kernel module overlay with parameters 'redirect_max=many': Invalid argument",
        ),
    ],
)
def test_a_module_that_cannot_be_loaded_is_named(
    agent: AgentClient, module: KernelModule, code: int, said: str
) -> None:
    with pytest.raises(AgentError, match=said) as refused:
        agent.ask("CreateSandbox", CreateSandboxRequest(sandbox_id="s", kernel_modules=[module]), Empty)
    assert refused.value.code == code


@pytest.mark.parametrize("method", ["SetPolicy", "GetIPTables", "MemAgentMemcgSet", "AddSwap", "ResizeVolume"])
def test_what_needs_a_part_that_this_image_has_not_is_unimplemented(agent: AgentClient, method: str) -> None:
    with pytest.raises(
        AgentError, match=f"method grpc.AgentService/{method} is not supported by this agent"
    ) as refused:
        agent.ask(method, Empty(), Empty)
    assert refused.value.code == status.UNIMPLEMENTED


def test_a_file_has_its_name_when_it_is_whole(vm: GuestVm, agent: AgentClient) -> None:
    data = os.urandom(300)
    copy(agent, f"{ROOT}/half", data[:200], mode=stat.S_IFREG | 0o644, size=300)
    assert "half\n" not in said(vm, agent, "ls -1 /")
    copy(agent, f"{ROOT}/half", data[200:], mode=stat.S_IFREG | 0o644, size=300, offset=200)
    assert said(vm, agent, "stat -c %s /half") == "300\n"


def test_a_file_that_is_copied_again_is_replaced(vm: GuestVm, agent: AgentClient) -> None:
    for text in (b"a longer text\n", b"short\n"):
        put(agent, f"{ROOT}/again", text)
    assert said(vm, agent, "cat /again") == "short\n"


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", f"{SHARE_MOUNT_POINT}/../../../../etc/passwd", f"{SHARE_MOUNT_POINT}x/y", SHARE_MOUNT_POINT, "a"],
)
def test_a_path_outside_is_refused(agent: AgentClient, path: str) -> None:
    with pytest.raises(AgentError, match="is not a path below") as refused:
        copy(agent, path, b"x", mode=stat.S_IFREG | 0o644, size=1)
    assert refused.value.code == status.INVALID_ARGUMENT


def test_a_link_does_not_lead_outside(agent: AgentClient) -> None:
    copy(agent, f"{SHARE_MOUNT_POINT}/out", b"/etc", mode=stat.S_IFLNK | 0o777)
    with pytest.raises(AgentError, match="cannot copy to"):
        copy(agent, f"{SHARE_MOUNT_POINT}/out/passwd", b"x", mode=stat.S_IFREG | 0o644, size=1)


@pytest.mark.parametrize(
    ("mode", "size", "offset"), [(stat.S_IFREG, 1, 0), (stat.S_IFREG, 9, -1), (stat.S_IFCHR, 9, 0)]
)
def test_what_is_no_piece_of_a_file_is_refused(agent: AgentClient, mode: int, size: int, offset: int) -> None:
    with pytest.raises(AgentError) as refused:
        copy(agent, f"{ROOT}/bad", b"two", mode=mode | 0o644, size=size, offset=offset)
    assert refused.value.code == status.INVALID_ARGUMENT


def test_the_clock_is_set(vm: GuestVm, agent: AgentClient) -> None:
    agent.ask("SetGuestDateTime", SetGuestDateTimeRequest(sec=1_000_000_000), Empty)
    assert said(vm, agent, "date -u +%Y-%m") == "2001-09\n"
    agent.ask("SetGuestDateTime", SetGuestDateTimeRequest(sec=int(time.time()), usec=5), Empty)
    with pytest.raises(AgentError, match="are no time"):
        agent.ask("SetGuestDateTime", SetGuestDateTimeRequest(sec=1, usec=1_000_000), Empty)


def test_entropy_is_taken(agent: AgentClient) -> None:
    agent.ask("ReseedRandomDev", ReseedRandomDevRequest(data=os.urandom(1000)), Empty)
    with pytest.raises(AgentError, match="no entropy"):
        agent.ask("ReseedRandomDev", ReseedRandomDevRequest(), Empty)


def test_processors_that_do_not_come_are_told(agent: AgentClient) -> None:
    agent.ask("OnlineCPUMem", OnlineCPUMemRequest(), Empty)
    with pytest.raises(AgentError, match="0 of 1 processors came online"):
        agent.ask("OnlineCPUMem", OnlineCPUMemRequest(nb_cpus=1, cpu_only=True), Empty)


def test_memory_that_is_probed_for(agent: AgentClient) -> None:
    details = agent.ask("GetGuestDetails", GuestDetailsRequest(mem_hotplug_probe=True), GuestDetailsResponse)
    if not details.support_mem_hotplug_probe:
        with pytest.raises(AgentError, match="no memory at 0x100000000"):
            agent.ask("MemHotplugByProbe", MemHotplugByProbeRequest(addresses=[1 << 32]), Empty)


def test_metrics(agent: AgentClient) -> None:
    text = agent.ask("GetMetrics", Empty(), Metrics).metrics
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(samples['kata_guest_meminfo{item="mem_total"}']) > 100 << 20
    assert float(samples['kata_guest_load{item="load1"}']) >= 0
    assert int(samples['kata_guest_cpu_time{cpu="total",item="user"}']) >= 0
    assert int(samples['kata_guest_netdev_stat{interface="lo",item="recv_bytes"}']) == 0
    assert int(samples["kata_agent_total_rss"]) > 1 << 20
    assert samples["kata_agent_scrape_count"] == "1"
