"""The agent in a real VM: disks, found by place and serial, mounted, given back."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from common import status
from common.channel import NO_STREAM
from common.protocols.agent import (
    AGENT_SERVICE,
    OVERLAY_DIRECTORY,
    CreateContainerRequest,
    Empty,
    ReleaseDisksRequest,
    Storage,
)
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import GuestSandbox, Task, container_spec, make_busybox_rootfs
from common.testing.stack import GUEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ids = itertools.count(1)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[GuestSandbox]:
    with GuestSandbox(GUEST / "vmlinux", GUEST / "initrd.img") as running:
        yield running


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("content") / "rootfs"
    make_busybox_rootfs(directory)
    (directory / "hello").write_text("from the disk")
    return directory


@pytest.fixture
def ext4(content: Path, tmp_path: Path) -> Path:
    """A disk with a root file system."""
    path = tmp_path / "ext4"
    command = ["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(path), "8M"]
    subprocess.run(command, check=True)
    return path


def storage(driver: str, source: str, serial: str, *options: str, fstype: str = "ext4") -> Storage:
    return Storage(
        driver=driver,
        driver_options=[f"serial={serial}"],
        source=source,
        fstype=fstype,
        options=list(options),
        mount_point=f"/run/kata-containers/{serial}/rootfs",
    )


def new_serial() -> str:
    return f"{next(_ids):020x}"


def output(task: Task) -> str:
    said = task.stdout.read_all().decode()
    assert task.wait() == 0, said
    return said


def seen_disks(sandbox: GuestSandbox) -> list[str]:
    """Return the disks that the guest's kernel has."""
    task = sandbox.run("ls", "/sys/block")
    disks = output(task).split()
    task.remove()
    return disks


PLACES = [("blk", "05/01", None), ("scsi", "0:7", 7)]


@pytest.mark.parametrize(("driver", "source", "lun"), PLACES)
def test_a_container_on_a_disk_and_what_it_wrote(
    sandbox: GuestSandbox, ext4: Path, driver: str, source: str, lun: int | None
) -> None:
    said = ""
    for written in ("first", "second"):
        serial = new_serial()
        sandbox.vm.plug_disk(ext4, serial, lun=lun)
        disk = storage(driver, source, serial)
        task = sandbox.run("sh", "-c", f"cat hello; echo {written} >> written; cat written", storages=[disk])
        said = output(task)
        assert said.startswith("from the disk")
        task.remove()
        sandbox.vm.unplug_disk(serial)
        assert seen_disks(sandbox) == []
    assert said.endswith("first\nsecond\n"), "what was written is on the disk once the container is removed"


def test_the_request_may_come_before_the_device(sandbox: GuestSandbox, ext4: Path) -> None:
    serial = new_serial()
    disk = storage("blk", "05/02", serial)
    spec = container_spec(disk.mount_point, "true")
    stream = sandbox.vm.stream()
    request = CreateContainerRequest(
        container_id="early",
        storages=[disk],
        oci=spec,
        stdin_port=NO_STREAM,
        stdout_port=stream.number,
        stderr_port=NO_STREAM,
    )
    asked = sandbox.agent.begin(AGENT_SERVICE, "CreateContainer", request)
    assert seen_disks(sandbox) == []
    assert not sandbox.agent.is_answered(asked)
    sandbox.vm.plug_disk(ext4, serial, slot=2)
    sandbox.agent.finish(asked, Empty)
    stream.close()
    task = Task(sandbox, "early", "early", stdin=False, terminal=False)
    task.remove()
    task.close()
    sandbox.vm.unplug_disk(serial)


def test_an_exchanged_disk_is_used_when_the_guest_knows_its_size(sandbox: GuestSandbox, ext4: Path) -> None:
    """Its name is not what the host supposes, since the guest may have other disks."""
    serial, size = new_serial(), 16 << 20
    disk = storage("mmioblk", "/dev/vdz", serial)
    disk.driver_options.append(f"sectors={size // 512}")
    sandbox.vm.plug_disk(ext4, serial)
    stream = sandbox.vm.stream()
    spec = container_spec(disk.mount_point, "true")
    request = CreateContainerRequest(container_id="exchanged", storages=[disk], oci=spec, stdout_port=stream.number)
    asked = sandbox.agent.begin(AGENT_SERVICE, "CreateContainer", request)
    assert seen_disks(sandbox) == ["vda"]
    assert not sandbox.agent.is_answered(asked)
    sandbox.vm.resize_disk(serial, size)
    sandbox.agent.finish(asked, Empty)
    stream.close()
    task = Task(sandbox, "exchanged", "exchanged", stdin=False, terminal=False)
    task.remove()
    task.close()
    assert seen_disks(sandbox) == ["vda"], "the drive stays, whatever is behind it"
    sandbox.vm.unplug_disk(serial)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_disk_that_nobody_tells_of_is_looked_for_and_let_go_also_if_it_was_in_vain(
    sandbox: GuestSandbox, ext4: Path, fstype: str
) -> None:
    for _ in range(2):
        serial = new_serial()
        sandbox.vm.plug_disk(ext4, serial)
        disk = storage("blk", "05/01", serial, fstype=fstype)
        disk.driver_options.append("untold")
        if fstype == "ext4":
            task = sandbox.run("cat", "hello", storages=[disk])
            assert output(task) == "from the disk"
            task.remove()
        else:
            with pytest.raises(AgentError, match="cannot mount xfs"):
                sandbox.run("true", storages=[disk])
        assert seen_disks(sandbox) == [], "it was not asked for"
        sandbox.vm.unplug_disk(serial)


def test_a_disk_that_no_container_has_is_let_go_when_that_is_asked(
    sandbox: GuestSandbox, ext4: Path, tmp_path: Path
) -> None:
    """To look for one disk is to find all."""
    serials = new_serial(), new_serial()
    disks = [storage("blk", f"05/0{slot}", serial) for slot, serial in enumerate(serials, start=1)]
    for slot, (serial, disk) in enumerate(zip(serials, disks, strict=True), start=1):
        image = tmp_path / serial
        shutil.copyfile(ext4, image)
        sandbox.vm.plug_disk(image, serial, slot=slot)
        disk.driver_options.append("untold")
    task = sandbox.run("cat", "hello", storages=[disks[0]])
    assert output(task) == "from the disk"
    assert seen_disks(sandbox) == ["vda", "vdb"]
    sandbox.agent.ask("ReleaseDisks", ReleaseDisksRequest(disks=[disks[1]]), Empty)
    assert seen_disks(sandbox) == ["vda"]
    with pytest.raises(AgentError, match="disk '05/01' is in use"):
        sandbox.agent.ask("ReleaseDisks", ReleaseDisksRequest(disks=[disks[0]]), Empty)
    task.remove()
    assert seen_disks(sandbox) == []
    for serial in serials:
        sandbox.vm.unplug_disk(serial)


def test_a_disk_with_another_serial_is_not_the_one_that_is_meant(sandbox: GuestSandbox, ext4: Path) -> None:
    serial = new_serial()
    sandbox.vm.plug_disk(ext4, serial)
    wrong = storage("blk", "05/01", "f" * 20)
    with pytest.raises(AgentError, match=f"no blk device '05/01' with serial {'f' * 20} appeared within 10 s") as error:
        sandbox.run("true", storages=[wrong])
    assert error.value.code == status.UNAVAILABLE
    sandbox.vm.unplug_disk(serial)


def test_a_read_only_file_system_of_erofs(sandbox: GuestSandbox, content: Path, tmp_path: Path) -> None:
    image = tmp_path / "erofs"
    subprocess.run(["/usr/bin/mkfs.erofs", "--quiet", str(image), str(content)], check=True)
    serial = new_serial()
    sandbox.vm.plug_disk(image, serial)
    disk = storage("blk", "05/01", serial, "ro", fstype="erofs")
    task = sandbox.run("sh", "-c", "cat hello; touch x 2>&1 || true", storages=[disk])
    assert "Read-only file system" in output(task)
    task.remove()
    sandbox.vm.unplug_disk(serial)


def test_layers_that_are_disks(sandbox: GuestSandbox, content: Path, tmp_path: Path) -> None:
    """The directories of the overlay are made the first time, and found the second."""
    lower, upper, said = tmp_path / "lower", tmp_path / "upper", ""
    subprocess.run(["/usr/bin/mkfs.erofs", "--quiet", str(lower), str(content)], check=True)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", str(upper), "8M"], check=True)
    for written in ("first", "second"):
        serials = new_serial(), new_serial()
        sandbox.vm.plug_disk(lower, serials[0], slot=1)
        sandbox.vm.plug_disk(upper, serials[1], slot=2)
        layers = [storage("blk", "05/01", serials[0], "ro", fstype="erofs"), storage("blk", "05/02", serials[1])]
        script = f"cat hello; echo {written} >> written; cat written"
        task = sandbox.run("sh", "-c", script, storages=[*layers, overlay(*layers)])
        said = output(task)
        assert said.startswith("from the disk")
        task.remove()
        for serial in serials:
            sandbox.vm.unplug_disk(serial)
    assert said.endswith("first\nsecond\n")


def overlay(lower: Storage, upper: Storage) -> Storage:
    directories = [f"{upper.mount_point}/{name}" for name in ("upper", "work")]
    options = [f"lowerdir={lower.mount_point}", *(f"{d.rpartition('/')[2]}dir={d}" for d in directories)]
    return Storage(
        driver="overlayfs",
        driver_options=[f"{OVERLAY_DIRECTORY}={directory}" for directory in directories],
        source="overlay",
        fstype="overlay",
        options=options,
        mount_point=f"/run/kata-containers/{new_serial()}/rootfs",
    )


@pytest.mark.parametrize(
    ("fstype", "said"),
    [("xfs", "Invalid argument|Structure needs cleaning"), ("squashfs", "No such device"), ("../boot", "No such")],
)
def test_what_cannot_be_mounted_is_said_and_given_back(
    sandbox: GuestSandbox, ext4: Path, fstype: str, said: str
) -> None:
    """xfs is known to the guest, and finds no file system of its own; squashfs is not known."""
    serial = new_serial()
    sandbox.vm.plug_disk(ext4, serial)
    with pytest.raises(AgentError, match=f"cannot mount {fstype} '/dev/vda' at .*: ({said})"):
        sandbox.run("true", storages=[storage("blk", "05/01", serial, fstype=fstype)])
    sandbox.vm.unplug_disk(serial)


def test_what_was_mounted_before_the_failure_is_given_back(sandbox: GuestSandbox, ext4: Path) -> None:
    serial = new_serial()
    sandbox.vm.plug_disk(ext4, serial, lun=1)
    root, other = storage("scsi", "0:1", serial), storage("scsi", "0:1", serial, fstype="erofs")
    other.mount_point += "/mnt"
    with pytest.raises(AgentError, match="cannot mount erofs"):
        sandbox.run("true", storages=[root, other])
    assert seen_disks(sandbox) == [], "a SCSI disk that is given back is gone for the guest"
    sandbox.vm.unplug_disk(serial)


@pytest.mark.parametrize(
    ("driver", "source", "code"),
    [
        ("blk", "zz", status.INVALID_ARGUMENT),
        ("blk", "", status.INVALID_ARGUMENT),
        ("blk", "../../vda", status.INVALID_ARGUMENT),
        ("scsi", "0", status.INVALID_ARGUMENT),
        ("scsi", "a:b", status.INVALID_ARGUMENT),
        ("watchable-bind", "/dev/pmem0", status.UNIMPLEMENTED),
    ],
)
def test_what_names_no_device_is_refused_at_once(sandbox: GuestSandbox, driver: str, source: str, code: int) -> None:
    with pytest.raises(AgentError) as error:
        sandbox.run("true", storages=[storage(driver, source, "0")])
    assert error.value.code == code


def test_a_guest_without_disks_has_no_drivers_for_them() -> None:
    with GuestSandbox(GUEST / "vmlinux", GUEST / "initrd.img") as fresh:
        task = fresh.run("cat", "/proc/modules")
        loaded = {line.split()[0] for line in output(task).splitlines()}
    assert "virtiofs" in loaded
    assert not loaded & {"virtio_blk", "virtio_scsi", "sd_mod", "erofs", "xfs", "overlay"}
