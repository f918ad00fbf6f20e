"""QEMU's command line, piece by piece."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from common.channel import STREAM_PORTS
from common.config import ExtraMonitor, QemuConfig
from procs.vmm_manager.drivers import virtiofsd
from procs.vmm_manager.drivers.qemu import cmdline
from procs.vmm_manager.drivers.qemu.channel import DaemonDevice, Device, SerialDevice, VsockDevice, choose_device
from procs.vmm_manager.drivers.qemu.topology import Topology

if TYPE_CHECKING:
    from pathlib import Path


def argv(sandbox_id: str = "s1", accelerator: str = "tcg", **config: object) -> list[str]:
    return command(SerialDevice(), sandbox_id, accelerator, **config)


def command(channel: Device, sandbox_id: str = "s1", accelerator: str = "tcg", **config: object) -> list[str]:
    used = QemuConfig(kernel="/k", initrd="/i", **config)  # type: ignore[arg-type]
    return cmdline.QemuCommand(
        sandbox_id=sandbox_id, config=used, accelerator=accelerator, qmp_fd=7, channel=channel
    ).argv()


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def test_memory_is_shared_with_virtiofsd() -> None:
    arguments = argv(default_memory=300)
    assert values(arguments, "-object") == ["memory-backend-memfd,id=ram,size=300M,share=on"]
    assert "memory-backend=ram" in values(arguments, "-machine")[0]


def test_what_may_come_later_is_said_at_the_start() -> None:
    arguments = argv(default_memory=300, default_maxmemory=600, memory_slots=4, default_maxvcpus=1)
    assert values(arguments, "-m") == ["300M,slots=4,maxmem=600M"]
    assert values(arguments, "-smp") == ["1"]
    assert values(argv(default_vcpus=1, default_maxvcpus=2), "-smp") == ["1,maxcpus=2"]
    assert values(argv(default_memory=300, default_maxmemory=300), "-m") == ["300M"]
    assert values(argv(default_memory=300, default_maxmemory=600, memory_slots=0), "-m") == ["300M"]
    assert values(argv(default_memory=300), "-m") == ["300M"], "upstream's default would be all that the host has"


@pytest.mark.parametrize(("accelerator", "cpu"), [("kvm", "host"), ("tcg", "max,la57=off,erms=off,fsrm=off")])
def test_the_processor_fits_the_accelerator(accelerator: str, cpu: str) -> None:
    arguments = argv(accelerator=accelerator)
    assert values(arguments, "-cpu") == [cpu]
    assert f"accel={accelerator}" in values(arguments, "-machine")[0]


def test_every_port_has_a_socket_of_its_own() -> None:
    devices = values(argv(), "-device")
    ports = [device for device in devices if device.startswith("virtserialport")]
    assert len(ports) == STREAM_PORTS + 1
    assert "name=kata.agent" in ports[0]
    assert len({port.split("chardev=")[1].split(",")[0] for port in ports}) == len(ports)
    assert all(",nr=0," not in port for port in ports), "port 0 is a console's"


def test_a_guest_with_vsock_has_no_ports_and_listens_to_root_alone() -> None:
    arguments = command(VsockDevice(77, (9,)), kernel_params="agent.log=info")
    devices = values(arguments, "-device")
    assert [device for device in devices if device.startswith("vhost-vsock-pci")] == [
        "vhost-vsock-pci,id=vsock,bus=pcie.0,addr=0x3,guest-cid=77,vhostfd=9"
    ]
    assert not [device for device in devices if "serial" in device]
    assert values(arguments, "-append")[0].endswith(" agent.vsock_reserved agent.log=info")


def test_a_daemon_is_met_on_a_connection_that_is_made_already() -> None:
    arguments = command(DaemonDevice((9,), None))
    assert "socket,id=vsock,fd=9" in values(arguments, "-chardev")
    devices = values(arguments, "-device")
    assert "vhost-user-vsock-pci,id=vsock,bus=pcie.0,addr=0x3,chardev=vsock" in devices
    assert not [device for device in devices if "serial" in device]
    assert "agent.vsock_reserved" not in values(arguments, "-append")[0], "nobody but root can connect anyway"


def test_a_host_without_vsock_gets_ports(tmp_path: Path) -> None:
    """There is no device, or what opens there takes no address."""
    (tmp_path / "regular").touch()
    for name in ("absent", "regular"):
        assert choose_device(str(tmp_path / name)) == SerialDevice()


def test_the_hotplug_buses_are_the_topologys() -> None:
    arguments = argv(pcie_root_port=3)
    made = list(Topology(QemuConfig(pcie_root_port=3)).arguments())
    assert arguments[-len(made) :] == made


def test_configuration_cannot_add_options() -> None:
    assert values(argv("a,b=c"), "-name") == ["a,,b=c,debug-threads=on"]


def test_the_users_kernel_parameters_come_last() -> None:
    (parameters,) = values(argv(kernel_params="quiet=no x=1"), "-append")
    assert parameters.endswith(" quiet=no x=1")


def test_seccomp_is_qemus_only_if_configured() -> None:
    assert values(argv(), "-sandbox") == []
    assert values(argv(seccompsandbox="on,spawn=deny"), "-sandbox") == ["on,spawn=deny"]


def test_a_panic_leaves_qemu_paused_so_that_the_console_can_be_read() -> None:
    arguments = argv()
    assert values(arguments, "-action") == ["reboot=shutdown,shutdown=pause,panic=pause"]
    assert values(arguments, "-chardev")[0].startswith("ringbuf,id=console,")


@pytest.mark.parametrize(
    ("mountinfo", "sandbox"),
    [
        (["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 0:5 / /proc rw - proc proc rw"], "namespace"),
        (["2 1 0:5 / /proc rw - proc proc rw"], "chroot"),
    ],
)
def test_virtiofsd_is_as_isolated_as_the_root_allows(mountinfo: list[str], sandbox: str) -> None:
    assert virtiofsd._sandbox(mountinfo) == sandbox


def test_a_path_with_what_libfuse_splits_at_is_one_source() -> None:
    arguments = virtiofsd.argv(QemuConfig(), "/a,b\\c", 9, sandbox="namespace", is_rust=False)
    assert values(arguments, "-o")[0] == "source=/a\\,b\\\\c"
    assert "--fd=9" in arguments


def test_virtiofsd_in_rust_has_arguments_of_its_own() -> None:
    config = QemuConfig(virtio_fs_cache="none", virtio_fs_extra_args=("--thread-pool-size=1",))
    assert virtiofsd.argv(config, "/a,b", 9, sandbox="chroot", is_rust=True)[1:] == [
        "--fd=9",
        "--shared-dir=/a,b",
        "--cache=never",
        "--sandbox=chroot",
        "--log-level=error",
        "--thread-pool-size=1",
    ]


def test_no_cache_has_a_name_in_each_virtiofsd() -> None:
    c = virtiofsd.argv(QemuConfig(virtio_fs_cache="never"), "/a", 9, sandbox="chroot", is_rust=False)
    assert "cache=none" in values(c, "-o")


def test_virtiofsd_says_which_one_it_is(tmp_path: Path) -> None:
    assert not virtiofsd.is_rust("/usr/lib/qemu/virtiofsd")
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho virtiofsd 1.13.0\n")
    program.chmod(0o755)
    assert virtiofsd.is_rust(str(program))


@pytest.mark.parametrize(("kind", "option"), [("hmp", "-monitor"), ("qmp", "-qmp"), ("qmp-pretty", "-qmp-pretty")])
def test_people_get_a_monitor_of_their_own_only_for_debugging(kind: str, option: str) -> None:
    monitor = {"extra_monitor_socket": ExtraMonitor(kind)}
    assert values(argv(**monitor, enable_debug=True), option) == ["unix:extra-monitor.sock,server=on,wait=off"]
    assert values(argv(**monitor), option) == []


def test_debug_lets_guest_and_vmm_say_more() -> None:
    quiet, loud = argv(kernel_params="x=1"), argv(kernel_params="x=1", enable_debug=True)
    assert values(quiet, "-d") == []
    assert values(loud, "-d") == ["guest_errors,unimp"]
    assert values(quiet, "-append")[0].endswith(" x=1")
    assert values(loud, "-append")[0].endswith(" debug x=1"), "after `quiet`, so that it wins; before the user's own"
