"""The agent in a real VM: disks that a container gets as device nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common import status
from common.protocols import oci
from common.protocols.agent import GUEST_DRIVEN, Device, Storage
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import see_cgroups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from common.testing.guest_sandbox import GuestSandbox, Task

DISK, OTHER = "d" * 20, "e" * 20
NODE = "/dev/data"
HOST = (7, 5)
"""The numbers of the host's device: another disk in the guest, if any."""


@pytest.fixture
def disk(guest: GuestSandbox, tmp_path: Path) -> Iterator[Path]:
    """The content of a disk that the guest has as its second one."""
    other, content = tmp_path / "other", tmp_path / "disk"
    other.write_bytes(b"other".ljust(1 << 20))
    content.write_bytes(b"right".ljust(1 << 20))
    with plugged(guest, other, OTHER, slot=1), plugged(guest, content, DISK, slot=2):
        yield content


@contextmanager
def plugged(
    guest: GuestSandbox, content: Path, serial: str, *, slot: int = 1, lun: int | None = None
) -> Iterator[None]:
    guest.vm.plug_disk(content, serial, slot=slot, lun=lun)
    yield
    guest.vm.unplug_disk(serial)


def rules(*numbers: tuple[int, int], access: str = "rwm") -> list[oci.LinuxDeviceCgroup]:
    """Return what a container may use: nothing, but for some of the host's disks."""
    deny = oci.LinuxDeviceCgroup(allow=False, type="a", major=-1, minor=-1, access="rwm")
    allowed = [oci.LinuxDeviceCgroup(allow=True, type="b", major=a, minor=b, access=access) for a, b in numbers]
    return [deny, *allowed]


def with_node(*may_use: tuple[int, int], access: str = "rwm") -> Callable[[oci.Spec], None]:
    def adjust(spec: oci.Spec) -> None:
        assert spec.linux
        spec.linux.resources = oci.LinuxResources(devices=rules(*may_use, access=access))
        major, minor = HOST
        node = oci.LinuxDevice(path=NODE, type="b", major=major, minor=minor, file_mode=0o640, uid=3, gid=4)
        spec.linux.devices = [node]

    return adjust


def with_mount(source: str, *, has_rules: bool) -> Callable[[oci.Spec], None]:
    def adjust(spec: oci.Spec) -> None:
        assert spec.linux
        spec.linux.resources = oci.LinuxResources(devices=rules() if has_rules else [])
        spec.mounts.append(oci.Mount(destination="/mnt/data", type="bind", source=source, options=["bind"]))

    return adjust


def device(kind: str = "blk", place: str = "05/02", path: str = NODE, serial: str = DISK) -> Device:
    return Device(id=place, type=kind, container_path=path, options=[f"serial={serial}"])


def said_by(task: Task) -> str:
    said = task.stdout.read_all().decode()
    task.wait()
    task.remove()
    return said


def test_a_device_has_the_guests_numbers_and_what_else_the_host_says(guest: GuestSandbox, disk: Path) -> None:
    script = f"head -c 5 {NODE}; echo; stat -c '%a %u %g %t' {NODE}; printf new | dd of={NODE} conv=notrunc 2>/dev/null"
    task = guest.run("sh", "-c", script, adjust=with_node(HOST), devices=[device()])
    assert said_by(task) == "right\n640 3 4 fe\n", "virtio-blk's major number is dynamic: 254"
    assert disk.read_bytes().startswith(b"newht"), "it is with the host when the container is removed"


PASSED = "0000:3b:00.0"


def passed(place: str) -> Device:
    """Return what the agent is told of a device of the host, which a disk stands for here: QEMU has no other."""
    return Device(id="12", type=GUEST_DRIVEN, container_path="/dev/vfio/12", options=[f"{PASSED}={place}"])


def test_a_device_of_the_host_is_waited_for_driven_and_named_as_it_is_here(guest: GuestSandbox, tmp_path: Path) -> None:
    content = tmp_path / "disk"
    content.write_bytes(b"right".ljust(1 << 20))

    def adjust(spec: oci.Spec) -> None:
        assert spec.process
        spec.process.env += [f"PCIDEVICE_EXAMPLE_COM_DISK={PASSED},0000:3b:00.1", f"OTHER={PASSED}"]

    script = "until readlink /sys/block/vd*; do sleep 0.1; done; env | grep 0000:"
    with ThreadPoolExecutor() as pool:
        creating = pool.submit(guest.run, "sh", "-c", script, adjust=adjust, devices=[passed("05/03")])
        with plugged(guest, content, DISK, slot=3):
            disk, *names = said_by(creating.result()).splitlines()
    address = disk.split("/")[4]
    assert (address[:6], address[7:]) == ("0000:0", ":03.0"), "the disk's driver was loaded"
    assert set(names) == {f"PCIDEVICE_EXAMPLE_COM_DISK={address},0000:3b:00.1", f"OTHER={PASSED}"}


def test_a_device_of_the_host_that_does_not_come_is_said(guest: GuestSandbox) -> None:
    with pytest.raises(AgentError, match="no device of the host appeared at 05/09 within 10 s"):
        guest.create("true", devices=[passed("05/09")])


def test_a_scsi_disk_is_a_device_too_and_given_back(guest: GuestSandbox, tmp_path: Path) -> None:
    content = tmp_path / "disk"
    content.write_bytes(b"right".ljust(1 << 20))
    with plugged(guest, content, DISK, lun=3):
        wanted = device("scsi", "0:3")
        assert said_by(guest.run("head", "-c", "5", NODE, adjust=with_node(HOST), devices=[wanted])) == "right"
        assert "sda" not in said_by(guest.run("ls", "/sys/block"))


@pytest.mark.parametrize(("may_use", "access"), [((7, 6), "rwm"), (HOST, "w")], ids=["another", "to write"])
def test_rules_mean_the_hosts_device(guest: GuestSandbox, disk: Path, may_use: tuple[int, int], access: str) -> None:
    assert disk.exists()
    script = f"head -c 5 {NODE} 2>&1"
    task = guest.run("sh", "-c", script, adjust=with_node(may_use, access=access), devices=[device()])
    assert "Operation not permitted" in said_by(task)


def test_limits_mean_the_hosts_device(guest: GuestSandbox, disk: Path) -> None:
    assert disk.exists()
    major, minor = HOST

    def adjust(spec: oci.Spec) -> None:
        with_node(HOST)(spec)
        see_cgroups(spec)
        assert spec.linux
        assert spec.linux.resources
        limits = [oci.LinuxThrottleDevice(major=major, minor=minor, rate=rate) for rate in (1 << 20, 200)]
        spec.linux.resources.block_io = oci.LinuxBlockIO(
            throttle_write_bps_device=limits[:1], throttle_read_iops_device=limits[1:]
        )

    task = guest.run(
        "sh", "-c", f"stat -c '%t %T' {NODE}; cat /sys/fs/cgroup/*/io.max", adjust=adjust, devices=[device()]
    )
    numbers, limit = said_by(task).splitlines()
    here = ":".join(str(int(number, 16)) for number in numbers.split())
    assert limit == f"{here} rbps=max wbps=1048576 riops=200 wiops=max"


@pytest.mark.parametrize("has_rules", [True, False])
def test_a_mounted_node_may_be_used(guest: GuestSandbox, disk: Path, *, has_rules: bool) -> None:
    assert disk.exists()
    node = Storage(
        driver="blk",
        driver_options=[f"serial={DISK}"],
        source="05/02",
        fstype="bind",
        options=["bind"],
        mount_point="/run/kata-containers/data",
    )
    adjust = with_mount(node.mount_point, has_rules=has_rules)
    (guest.rootfs / "mnt").mkdir(exist_ok=True)
    task = guest.run("head", "-c", "5", "/mnt/data", adjust=adjust, storages=[node])
    assert said_by(task) == "right"


@pytest.mark.parametrize(
    ("wanted", "code", "said"),
    [
        (device("vfio-pci"), status.UNIMPLEMENTED, "of type 'vfio-pci' is not supported"),
        (device(path="/dev/x"), status.INVALID_ARGUMENT, "the specification has no device '/dev/x'"),
        (device(place="zz"), status.INVALID_ARGUMENT, "'zz' is not a PCI path"),
        (passed("zz"), status.INVALID_ARGUMENT, "'zz' is not a PCI path"),
        (passed(""), status.INVALID_ARGUMENT, "is not <address>=<PCI path>"),
    ],
    ids=["type", "path", "place", "place of the host's", "no place of the host's"],
)
def test_what_is_no_device_is_refused_at_once(guest: GuestSandbox, wanted: Device, code: int, said: str) -> None:
    with pytest.raises(AgentError, match=said) as error:
        guest.create("true", adjust=with_node(HOST), devices=[wanted])
    assert error.value.code == code
