"""What the machine has: its configuration, its drives; and in which words it refuses.

Source of words: src/vmm/src/rpc_interface.rs, src/vmm/src/vmm_config and src/vmm/src/device_manager of Firecracker
1.12.1 and 1.16.1; a real 1.16.1, driven with a guest (docs/hypervisors/firecracker.md).
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any

from common.testing.fake_firecracker.guest import Guest

# <linux/if_tun.h>
_TUNSETIFF = 0x4004_54CA
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000
"""``IFF_TAP``, ``IFF_NO_PI`` and ``IFF_VNET_HDR`` (src/vmm/src/devices/virtio/net/tap.rs)."""
_IFREQ = struct.Struct("16sH22x")

_MEMORY = "what the guest had in its memory"
_SLOTS = 32
_HOTPLUG_SINCE = (1, 16)
_TIME_DEVICE_SINCE = (1, 15)
_BOOT_FILES = {
    "kernel_image_path": "The kernel file cannot be opened:",
    "initrd_path": "The initrd file cannot be opened due to invalid path or invalid permissions.",
}
_NO_SLOT = "PCI manager error: PCI root error: Could not find an available device slot on the PCI bus."
_ELF = b"\x7fELF"
_AFTER_START = "The requested operation is not supported after starting the microVM."
_BEFORE_START = "The requested operation is not supported before starting the microVM."


class RefusalError(Exception):
    """An answer with status 400; the text is its ``fault_message``."""


@dataclass
class Drive:
    """A drive, and the file that it has open."""

    path: str
    is_read_only: bool
    body: dict[str, Any]
    file: int
    slot: int = 0

    def backing(self) -> str:
        """Return the host's file behind it: a loop device's, if it is one (Documentation/ABI/stable/sysfs-block)."""
        found = os.fstat(self.file)
        loop = Path(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}/loop/backing_file")
        return loop.read_text().strip() if loop.exists() else self.path


@dataclass
class Nic:
    """A network device, and the tap that it has open."""

    body: dict[str, Any]
    tap: int
    slot: int


@dataclass
class Machine:
    """A machine as it was started.

    Attributes:
        instance_id: ``--id``.
        version: which Firecracker it is.
        has_pci: ``--enable-pci``.
        is_jailed: whether the working directory is all it sees.
    """

    instance_id: str
    version: tuple[int, ...]
    has_pci: bool
    is_jailed: bool
    is_started: bool = False
    is_paused: bool = False
    memory: str = ""
    drives: dict[str, Drive] = field(default_factory=dict)
    nics: dict[str, Nic] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    guest: Guest = field(default_factory=Guest)
    vsock: socket.socket | None = None

    def info(self) -> dict[str, str]:
        """Answer ``GET /``."""
        state = ("Paused" if self.is_paused else "Running") if self.is_started else "Not started"
        version = ".".join(map(str, self.version))
        return {"id": self.instance_id, "state": state, "vmm_version": version, "app_name": "Firecracker"}

    def config(self) -> dict[str, Any]:
        """Answer ``GET /vm/config``, as far as it is looked at."""
        drives = [{**drive.body, "path_on_host": drive.path} for drive in self.drives.values()]
        names = ("boot-source", "machine-config", "vsock", "entropy")
        nics = [nic.body for nic in self.nics.values()]
        return {"drives": drives, "network-interfaces": nics, **{name: self.settings.get(name) for name in names}}

    def set(self, name: str, body: dict[str, Any]) -> None:
        """Take a part of the configuration."""
        self._require_before_start()
        if name == "boot-source":
            for key, wrong in _BOOT_FILES.items():
                os.close(self._open(str(body[key]), f"Boot source error: {wrong} {{}}"))
        elif name == "vsock":
            self.vsock = socket.socket(socket.AF_UNIX)
            self.vsock.bind(str(self._path(str(body["uds_path"]))))
            self.vsock.listen()
        self.settings[name] = body

    def act(self, _: str, body: dict[str, Any]) -> None:
        """Boot, which is the one action that is asked for."""
        assert body == {"action_type": "InstanceStart"}
        self._require_before_start()
        if "boot-source" not in self.settings:
            raise RefusalError("Start microvm error: Cannot start microvm without kernel configuration.")
        kernel = self._path(self.settings["boot-source"]["kernel_image_path"])
        with kernel.open("rb") as file:
            if file.read(len(_ELF)) != _ELF:
                raise RefusalError("Start microvm error: Cannot load kernel: Invalid Elf magic number")
        if len(self.drives) + len(self.nics) + 2 > self._most_devices():
            raise RefusalError("Start microvm error: Could not attach device: MMIO transport error: no GSI is left")
        self.is_started = True
        print("Linux version 6.1 (fake)", flush=True)  # noqa: T201 - the guest's console

    def move(self, _: str, body: dict[str, Any]) -> None:
        """Stop the guest's processors or let them go on; both may be asked for twice."""
        if not self.is_started:
            raise RefusalError(_BEFORE_START)
        self.is_paused = {"Paused": True, "Resumed": False}[body["state"]]

    def snapshot(self, what: str, body: dict[str, Any]) -> None:
        """Write the VM into two files, or go on from them."""
        if what == "create":
            self._save(body)
        else:
            self._load(body)

    def _save(self, body: dict[str, Any]) -> None:
        if not self.is_started:
            raise RefusalError(_BEFORE_START)
        if not self.is_paused:
            raise RefusalError("Create snapshot error: Cannot save the microVM state: the microVM is not paused")
        drives = [{**drive.body, "path_on_host": drive.path} for drive in self.drives.values()]
        state = {"version": self.version, "settings": self.settings, "drives": drives}
        for key, content in (("snapshot_path", json.dumps(state)), ("mem_file_path", _MEMORY)):
            wrong = "Create snapshot error: Cannot perform open on the snapshot backing file: {}"
            with open(self._open(str(body[key]), wrong, writable=True), "w") as file:  # noqa: PTH123 - a descriptor
                file.write(content)

    def _load(self, body: dict[str, Any]) -> None:
        if self.is_started or self.settings:
            raise RefusalError("Load snapshot error: Loading a microVM snapshot not allowed after configuring it")
        assert body["mem_backend"]["backend_type"] == "File"
        wrong = "Load snapshot error: Failed to restore from snapshot: Failed to open: {}"
        contents = []
        for path in (body["snapshot_path"], body["mem_backend"]["backend_path"]):
            with open(self._open(str(path), wrong)) as file:  # noqa: PTH123 - the same
                contents.append(file.read())
        state, self.memory = json.loads(contents[0]), contents[1]
        for name, settings in state["settings"].items():
            if name != "boot-source":
                self.set(name, settings)
        for drive in state["drives"]:
            self.put_drive(drive["drive_id"], drive)
        self.is_started, self.is_paused = True, not body.get("resume_vm")

    def put_drive(self, drive_id: str, body: dict[str, Any]) -> None:
        """Add a drive: to the configuration, or to the running VM."""
        if body.get("drive_id") != drive_id:
            raise RefusalError("The id from the path does not match the id from the body!")
        if self.is_started:
            self._require_hotplug(_AFTER_START)
            if drive_id in self.drives:
                raise RefusalError("Device ID in use")
        is_read_only, path = bool(body.get("is_read_only")), str(body["path_on_host"])
        wrong = "Drive config error: Unable to create the virtio block device: Virtio backend error: {}"
        file = self._open_disk(path, wrong, writable=not is_read_only)
        slot = self._free_slot() if self.has_pci else 0
        self.drives[drive_id] = Drive(path, is_read_only, body, file, slot)

    def patch_drive(self, drive_id: str, body: dict[str, Any]) -> None:
        """Put another file behind a drive."""
        if not self.is_started:
            raise RefusalError(_BEFORE_START)
        wrong = "Drive config error: Unable to patch the block device: {} Please verify the request arguments."
        if drive_id not in self.drives:
            raise RefusalError(wrong.format("Failed perform action on device: Device not found"))
        drive = self.drives[drive_id]
        path = str(body["path_on_host"])
        file = self._open_disk(path, wrong.format("Block: Virtio backend error: {}"), writable=not drive.is_read_only)
        os.close(drive.file)
        drive.path, drive.file = path, file

    def delete_drive(self, drive_id: str, _: dict[str, Any]) -> None:
        """Take a drive away, whatever the guest does with it."""
        if not self.is_started:
            raise RefusalError(_BEFORE_START)
        self._require_hotplug(f"Invalid request method and/or path: DELETE drives/{drive_id}.")
        if drive_id not in self.drives:
            raise RefusalError("Device not found")
        gone = self.drives.pop(drive_id)
        os.close(gone.file)
        self.guest.lose(gone.slot)

    def put_nic(self, name: str, body: dict[str, Any]) -> None:
        """Add a network device: to the configuration, or to the running VM."""
        if body.get("iface_id") != name:
            raise RefusalError(
                f"The id from the path [{name}] does not match the id from the body [{body['iface_id']}]!"
            )
        if self.is_started:
            self._require_hotplug(_AFTER_START)
            if name in self.nics:
                raise RefusalError("Device ID in use")
        mac = str(body.get("guest_mac"))
        if any(nic.body.get("guest_mac") == mac for other, nic in self.nics.items() if other != name):
            raise RefusalError(f"Network config error: The MAC address is already in use: {mac}")
        tap = self._open_tap(str(body["host_dev_name"]))
        if name in self.nics:
            os.close(self.nics[name].tap)
        self.nics[name] = Nic(body, tap, self._free_slot() if self.has_pci else 0)

    def delete_nic(self, name: str, _: dict[str, Any]) -> None:
        """Take a network device away, whatever the guest does with it."""
        if not self.is_started:
            raise RefusalError(_BEFORE_START)
        self._require_hotplug(f"Invalid request method and/or path: DELETE network-interfaces/{name}.")
        if name not in self.nics:
            raise RefusalError("Device not found")
        gone = self.nics.pop(name)
        os.close(gone.tap)
        self.guest.lose(gone.slot)

    def _open_tap(self, name: str) -> int:
        """Open a tap by its name, in the network namespace that this process is in."""
        tap = os.open(self._path("/dev/net/tun"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if name not in {found for _, found in socket.if_nameindex()}:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # to make one takes CAP_NET_ADMIN
            ioctl(tap, _TUNSETIFF, _IFREQ.pack(name.encode(), _TAP_FLAGS))
        except OSError as err:
            os.close(tap)
            raise RefusalError(
                "Network config error: Could not create the network device: Open tap device failed: Error while "
                f"creating ifreq structure: {err.strerror} (os error {err.errno}). Invalid TUN/TAP Backend provided by "
                f"{name}. Check our documentation on setting up the network devices."
            ) from err
        return tap

    def slots(self) -> dict[int, str]:
        """Return what is behind the device of each PCI slot: a file, or a tap."""
        disks = {drive.slot: drive.path for drive in self.drives.values()}
        return disks | {nic.slot: str(nic.body["host_dev_name"]) for nic in self.nics.values()}

    def seen(self) -> dict[str, str | None]:
        """Return what the guest sees."""
        if self.has_pci:
            return {str(slot): file for slot, file in self.guest.sees.items()}
        return {drive_id: drive.path for drive_id, drive in self.drives.items()}

    def devices(self) -> tuple[list[str], list[str]]:
        """Return disks by the names of their files in the jail and network devices by id, and the host's files."""
        disks = [drive for drive in self.drives.values() if drive.path.startswith("disk_")]
        return [*(drive.path for drive in disks), *self.nics], [drive.backing() for drive in disks]

    def _require_before_start(self) -> None:
        if self.is_started:
            raise RefusalError(_AFTER_START)

    def _require_hotplug(self, older_say: str) -> None:
        if self.version < _HOTPLUG_SINCE:
            raise RefusalError(older_say)
        if not self.has_pci:
            raise RefusalError("PCI is not enabled")

    def _most_devices(self) -> int:
        """Return how many devices have an interrupt: 19 on x86, some taken by the platform's own."""
        if self.has_pci:
            return _SLOTS - 1
        return 17 if self.version >= _TIME_DEVICE_SINCE else 18

    def _free_slot(self) -> int:
        """Return the lowest free slot; bridge, vsock and entropy have the first ones of a VM that has started."""
        first = 1 + (len({"vsock", "entropy"} & self.settings.keys()) if self.is_started else 0)
        taken = set(self.slots())
        free = [slot for slot in range(first, _SLOTS) if slot not in taken]
        if not free:
            raise RefusalError(_NO_SLOT)
        return free[0]

    def _path(self, path: str) -> Path:
        return Path(path.lstrip("/")) if self.is_jailed else Path(path)

    def _open(self, path: str, wrong: str, *, writable: bool = False) -> int:
        """Open a file as the jail's user could."""
        try:
            found = self._path(path).stat()
            owner = Path().stat().st_uid
            rights = found.st_mode >> (6 if found.st_uid == owner else 0)
            if owner and not (rights & 4 and (rights & 2 or not writable)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return os.open(self._path(path), os.O_RDWR if writable else os.O_RDONLY)
        except OSError as err:
            raise RefusalError(wrong.format(f"{err.strerror} (os error {err.errno})")) from err

    def _open_disk(self, path: str, wrong: str, *, writable: bool) -> int:
        file = self._open(path, wrong.format(f"Error manipulating the backing file: {{}} {path}"), writable=writable)
        mode = os.fstat(file).st_mode
        assert stat.S_ISREG(mode) or stat.S_ISBLK(mode), path
        return file
