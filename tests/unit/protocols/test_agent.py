"""The agent protocol: field numbers as upstream's ``agent.proto`` has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.protocols import agent, guest, health, network, stats

if TYPE_CHECKING:
    from common.protobuf import Message

# Written down a second time, from the protocol's table and not from the classes: a number that changes breaks every
# agent and shim that is already out there.
NUMBERS: dict[type[Message], dict[str, int]] = {
    agent.CreateSandboxRequest: {
        "hostname": 1, "dns": 2, "storages": 3, "sandbox_id": 5, "guest_hook_path": 6, "kernel_modules": 7,
    },
    agent.KernelModule: {"name": 1, "parameters": 2},
    agent.Storage: {"driver": 1, "driver_options": 2, "source": 3, "fstype": 4, "options": 5, "mount_point": 6},
    agent.Device: {"id": 1, "type": 2, "vm_path": 3, "container_path": 4, "options": 5},
    agent.CreateContainerRequest: {
        "container_id": 1, "exec_id": 2, "devices": 4, "storages": 5, "oci": 6,
        "stdin_port": 9, "stdout_port": 10, "stderr_port": 11,
    },
    agent.ContainerRequest: {"container_id": 1},
    agent.RemoveContainerRequest: {"container_id": 1, "timeout": 2},
    agent.UpdateContainerRequest: {"container_id": 1, "resources": 2},
    agent.OomEvent: {"container_id": 1},
    agent.ExecProcessRequest: {
        "container_id": 1, "exec_id": 2, "process": 4, "stdin_port": 5, "stdout_port": 6, "stderr_port": 7,
    },
    agent.ReleaseDisksRequest: {"disks": 1},
    agent.SignalProcessRequest: {"container_id": 1, "exec_id": 2, "signal": 3},
    agent.WaitProcessRequest: {"container_id": 1, "exec_id": 2},
    agent.WaitProcessResponse: {"status": 1},
    agent.WriteStreamRequest: {"container_id": 1, "exec_id": 2, "data": 3},
    agent.WriteStreamResponse: {"len": 1},
    agent.ReadStreamRequest: {"container_id": 1, "exec_id": 2, "len": 3},
    agent.ReadStreamResponse: {"data": 1},
    agent.CloseStdinRequest: {"container_id": 1, "exec_id": 2},
    agent.TtyWinResizeRequest: {"container_id": 1, "exec_id": 2, "row": 3, "column": 4},
    agent.GuestDetailsRequest: {"mem_block_size": 1, "mem_hotplug_probe": 2},
    agent.GuestDetailsResponse: {"mem_block_size_bytes": 1, "agent_details": 2, "support_mem_hotplug_probe": 3},
    agent.AgentDetails: {
        "version": 1, "init_daemon": 2, "device_handlers": 3, "storage_handlers": 4, "supports_seccomp": 5,
        "extra_features": 6,
    },
    guest.SetGuestDateTimeRequest: {"sec": 1, "usec": 2},
    guest.ReseedRandomDevRequest: {"data": 2},
    guest.OnlineCPUMemRequest: {"wait": 1, "nb_cpus": 2, "cpu_only": 3},
    guest.MemHotplugByProbeRequest: {"addresses": 1},
    guest.CopyFileRequest: {
        "path": 1, "file_size": 2, "file_mode": 3, "dir_mode": 4, "uid": 5, "gid": 6, "offset": 7, "data": 8,
    },
    guest.UpdateEphemeralMountsRequest: {"storages": 1},
    guest.VolumeStatsRequest: {"volume_guest_path": 1},
    guest.VolumeUsage: {"available": 1, "total": 2, "used": 3, "unit": 4},
    guest.VolumeCondition: {"abnormal": 1, "message": 2},
    guest.VolumeStatsResponse: {"usage": 1, "volume_condition": 2},
    guest.Metrics: {"metrics": 1},
    network.IPAddress: {"family": 1, "address": 2, "mask": 3},
    network.Interface: {
        "device": 1, "name": 2, "ip_addresses": 3, "mtu": 4, "hw_addr": 5, "device_path": 6, "type": 7, "raw_flags": 8,
    },
    network.UpdateInterfaceRequest: {"interface": 1},
    network.Interfaces: {"interfaces": 1},
    network.Route: {
        "dest": 1, "gateway": 2, "device": 3, "source": 4, "scope": 5, "family": 6, "flags": 7, "mtu": 8,
    },
    network.Routes: {"routes": 1},
    network.UpdateRoutesRequest: {"routes": 1},
    network.ARPNeighbor: {"to_ip_address": 1, "device": 2, "lladdr": 3, "state": 4, "flags": 5},
    network.ARPNeighbors: {"neighbors": 1},
    network.AddARPNeighborsRequest: {"neighbors": 1},
    stats.CpuUsage: {"total": 1, "percpu": 2, "kernel": 3, "user": 4},
    stats.ThrottlingData: {"periods": 1, "throttled_periods": 2, "throttled_time": 3},
    stats.CpuStats: {"cpu_usage": 1, "throttling_data": 2},
    stats.PidsStats: {"current": 1, "limit": 2},
    stats.MemoryData: {"usage": 1, "max_usage": 2, "failcnt": 3, "limit": 4},
    stats.MemoryStats: {
        "cache": 1, "usage": 2, "swap_usage": 3, "kernel_usage": 4, "use_hierarchy": 5, "stats": 6,
    },
    stats.BlkioStatsEntry: {"major": 1, "minor": 2, "op": 3, "value": 4},
    stats.BlkioStats: {"io_service_bytes_recursive": 1, "io_serviced_recursive": 2},
    stats.HugetlbStats: {"usage": 1, "max_usage": 2, "failcnt": 3},
    stats.CgroupStats: {
        "cpu_stats": 1, "memory_stats": 2, "pids_stats": 3, "blkio_stats": 4, "hugetlb_stats": 5,
    },
    stats.NetworkStats: {
        "name": 1, "rx_bytes": 2, "rx_packets": 3, "rx_errors": 4, "rx_dropped": 5,
        "tx_bytes": 6, "tx_packets": 7, "tx_errors": 8, "tx_dropped": 9,
    },
    stats.StatsContainerResponse: {"cgroup_stats": 1, "network_stats": 2},
    agent.TakenRequest: {"stream": 1, "size": 2},  # not upstream's: our shim and agent have it for themselves
    health.CheckRequest: {"service": 1},
    health.HealthCheckResponse: {"status": 1},
    health.VersionCheckResponse: {"grpc_version": 1, "agent_version": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: str(kind.__name__))
def test_field_numbers_are_upstreams(kind: type[Message]) -> None:
    assert {field.name: field.number for field in kind.fields()} == NUMBERS[kind]


def test_every_message_is_in_the_table() -> None:
    declared = {
        value
        for module in (agent, guest, health, network, stats)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert declared == {*NUMBERS, agent.Empty}
