"""What the VM has: a configuration, a device tree, slots, locked files; and in which words it refuses.

It has the real one's defects too. A name is used up by an add that fails. An add for which there is no slot leaves its
name in the tree, without a parent, and its file locked, for the VM's life. A device leaves the tree, and is told gone,
before its file is closed. Before version 53 the second removal of a network device is its end.

Source of words and order: v53.0 itself (docs/hypervisors/cloud-hypervisor.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import paths
from common.testing.fake_cloud_hypervisor.totals import RefusalError, Totals

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS = 32
MAX_SERIAL = 20
_BACKEND_TIMEOUT_S = 30.0
_GET_FEATURES = struct.pack("<III", 1, 1, 0)
"""``VHOST_USER_GET_FEATURES``: request, version, size of the payload (docs/interop/vhost-user.rst of QEMU)."""
_FEATURES_SIZE = 12 + 8
"""Bytes of the answer: the same header, and 64 bits."""

_SECTIONS = {"disk": "disks", "fs": "fs", "net": "net", "pmem": "pmem", "vfio": "devices"}
"""Where each kind of device is in the VM's configuration."""

_TUNGETIFF = 0x8004_54D2
_IFREQ_SIZE = 40
"""<linux/if_tun.h>, <linux/if.h>"""

_BOOT_DEVICES = ("__rng", "_vsock0")
_FILES = ("config.json", "state.json", "memory-ranges")
"""Of a snapshot."""


class Lock(NamedTuple):
    """A file that is open: where it is, which file that is, and whether it is written."""

    path: str
    file: tuple[int, int]
    is_written: bool


@dataclass
class Device:
    """A device in a slot, and what it holds of the host."""

    slot: int
    segment: int = 0
    held: ExitStack = field(default_factory=ExitStack)


@dataclass
class Machine:
    """One VMM and its VM.

    Attributes:
        version: what it says it is.
        tell: takes the events: source, name, properties.
        closing_takes_s: how long a file stays open after its device is told gone.
        lets_go: whether the guest lets devices go by itself.
        devices: what is plugged, by id.
        orphans: names in the tree that lead nowhere.
        locked: the files that are open.
        passed: the devices of the host that it has, by their paths in sysfs.
        busy: the device manager's lock.
        totals: processors and memory, once it has booted.
        memory: what was in a restored guest's memory.
        memory_mode: how that is to come.
    """

    version: str
    tell: Callable[[str, str, dict[str, str] | None], None]
    closing_takes_s: float
    lets_go: bool = True
    state: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    locked: list[Lock] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    totals: Totals | None = None
    memory: str = ""
    memory_mode: str = ""
    _next_name: int = 0

    def create(self, body: dict[str, Any]) -> None:
        """Take a configuration."""
        if self.state:
            raise RefusalError(500, "Error from API", "The VM could not be created", "VM is already created")
        self.config, self.state = {**body, **{section: [] for section in _SECTIONS.values()}}, "Created"

    def boot(self) -> None:
        """Begin to run: what it was made with takes the lowest slots."""
        if not self.state:
            raise RefusalError(404, "Error from API", "The VM could not boot", "VM is not created")
        self.tell("vm", "booting", None)
        self._next_name = len(_BOOT_DEVICES) - 1
        self.totals = Totals(self.config)
        for slot, name in enumerate(_BOOT_DEVICES, start=1):
            self.devices[name] = Device(slot)
        self.state = "Running"
        self.tell("vm", "booted", None)

    def pause(self) -> None:
        """Stop the guest's processors: it lets nothing go."""
        self._move("Running", "Paused", "be paused", "pause")
        self.tell("vm", "paused", None)

    def resume(self) -> None:
        """Let them go on."""
        self._move("Paused", "Running", "resume", "resume")
        self.tell("vm", "resumed", None)

    def info(self) -> dict[str, Any]:
        """Answer ``vm.info``: the configuration shows a removal that was asked for, the tree one that happened."""
        if not self.state:
            raise RefusalError(404, "Error from API", "The VM info is not available", "VM is not created")
        memory = self.totals.memory if self.totals else self.config["memory"]["size"]
        told: dict[str, Any] = {"config": self.config, "state": self.state, "memory_actual_size": memory}
        return told if self.state == "Created" else {**told, "device_tree": self._tree()}

    def snapshot(self, body: dict[str, Any]) -> None:
        """Write the VM into a directory, which has none of the files."""
        prefix: tuple[str, ...] = ("Error from API", "The VM could not be snapshotted", "Cannot snapshot VM")
        self.tell("vm", "snapshotting", None)
        if self.state != "Paused":
            reasons = ("Failed to snapshot migratable component", "Trying to snapshot while VM is running")
            raise RefusalError(500, *prefix, *reasons)
        directory = _directory_of(body["destination_url"])
        prefix = (*prefix, "Failed to send migratable component snapshot", "Error creating VM config snapshot file")
        self._require_access(str(directory), prefix)
        try:
            for name, content in (
                ("config.json", json.dumps(self.config)),
                ("state.json", json.dumps({"next_name": self._next_name})),
                ("memory-ranges", "what the guest had in its memory"),
            ):
                with (directory / name).open("x") as file:
                    file.write(content)
        except OSError as err:
            raise RefusalError(500, *prefix, f"{err.strerror} (os error {err.errno})") from err
        self.tell("vm", "snapshotted", None)

    def restore(self, body: dict[str, Any]) -> None:
        """Make a VM as it was written; it is paused."""
        prefix = ("Error from API", "The VM could not be restored")
        if self.state:
            raise RefusalError(500, *prefix, "VM is already created")
        mode = body.get("memory_restore_mode", "Copy")
        if mode != "Copy" and self.version < "52":
            raise RefusalError(400, "Error from API", "unknown field `memory_restore_mode`")
        directory = _directory_of(body["source_url"])
        try:
            config, state, self.memory = ((directory / name).read_text() for name in _FILES)
        except OSError as err:
            raise RefusalError(500, *prefix, f"{err.strerror} (os error {err.errno})") from err
        self.config, self.state, self.memory_mode = json.loads(config), "Paused", mode
        for slot, name in enumerate(_BOOT_DEVICES, start=1):
            self.devices[name] = Device(slot)
        self._next_name, self.totals = json.loads(state)["next_name"], Totals(self.config)
        self.tell("vm", "restored", None)

    def resize(self, body: dict[str, Any]) -> None:
        """Take new totals, of which the guest is told."""
        self.tell("vm", "resizing", None)
        if self.totals is None:
            raise RefusalError(404, "Error from API", "The VM could not be resized", "VM is not created")
        self.totals.resize(body)
        self.tell("vm", "resized", None)

    def add(self, kind: str, body: dict[str, Any]) -> dict[str, str]:
        """Plug a device: ``disk``, ``fs``, ``pmem``, ``vfio`` or ``net``, whose descriptors are ``fds`` of its body."""
        prefix: tuple[str, ...] = ("Error from API", f"The {kind} could not be added to the VM")
        serial = str(body.get("serial") or "")
        if len(serial) > MAX_SERIAL:
            reason = f"Block device serial length ({len(serial)}) exceeds maximum allowed length ({MAX_SERIAL})"
            raise RefusalError(500, *prefix, "Failed to validate config", reason)
        prefix = (*prefix, "Error from device manager")
        if body.get("id") in {*self.devices, *self.orphans}:
            raise RefusalError(500, *prefix, f"Invalid identifier as it is not unique: {body['id']}")
        segments = self.config.get("platform", {}).get("num_pci_segments", 1)
        segment = body.get("pci_segment", 0)
        if segment >= segments:
            reason = f"Invalid PCI segment id: {segment}"
            raise RefusalError(500, *prefix[:2], "Failed to validate config", reason)
        name = str(body.get("id") or self._new_name(kind))
        take = {
            "disk": self._lock,
            "fs": self._connect,
            "net": self._keep,
            "pmem": self._map,
            "vfio": self._open_group,
        }[kind]
        held = (self._connect if body.get("vhost_user") else take)(body, prefix)
        slot = self._slot(name, body, prefix)
        self.devices[name] = Device(slot, segment, held)
        self.config[_SECTIONS[kind]].append({**body, "id": name, "pci_segment": segment, "fds": None})
        return {"id": name, "bdf": _bdf(self.devices[name])}

    def remove(self, name: str) -> None:
        """Ask the guest to let a device go: accepted, no more; of one that is on its way out v53.0 knows nothing."""
        prefix = ("Error from API", "The device could not be removed from the VM", "Error from device manager")
        if name in self.orphans:
            raise RefusalError(500, *prefix, "Could not find the node in the device tree")
        if name not in self.devices or (name in self.leaving and self.version.startswith("53.")):
            reason = f"Failed to find device corresponding to the given identifier: {name}"
            raise RefusalError(500, *prefix, reason)
        if name in self.leaving and name.startswith("_net") and self.version < "53":
            os._exit(101)  # it panics
        self.leaving.add(name)
        self._drop_from_config(name)

    async def let_go(self, name: str) -> None:
        """Have the guest eject a device: slot and tree first, then the news, then the file, all under one lock."""
        async with self.busy:
            device = self.devices.pop(name, None)
            if device is None:
                return
            self.leaving.discard(name)
            self._drop_from_config(name)
            self.tell("vm", "device-removed", {"id": name, "bdf": _bdf(device)})
            await asyncio.sleep(self.closing_takes_s)
            device.held.close()

    def has(self) -> tuple[list[str], list[str]]:
        """Return the hot-plugged devices, and the files that are open."""
        plugged = [name for name in self.devices if name not in _BOOT_DEVICES]
        return plugged, [lock.path for lock in self.locked]

    def _move(self, before: str, after: str, what: str, verb: str) -> None:
        if self.state != before:
            reasons = (
                f"The VM could not {what}",
                f"Cannot {verb} VM",
                f"Failed to {verb} migratable component",
                f"Invalid transition: InvalidStateTransition({self.state}, {after})",
            )
            raise RefusalError(500, "Error from API", *reasons)
        self.state = after

    def _drop_from_config(self, name: str) -> None:
        for section in _SECTIONS.values():
            self.config[section] = [entry for entry in self.config[section] if entry["id"] != name]

    def _new_name(self, kind: str) -> str:
        name = f"_{kind}{self._next_name}"
        self._next_name += 1
        return name

    def _require_access(self, path: str, prefix: tuple[str, ...]) -> None:
        """Refuse what no rule of Landlock allows; where a file is found counts, also one that is bound there."""
        rules = self.config.get("landlock_rules") or ()
        found = Path(path).resolve()
        if self.config.get("landlock_enable") and not any(found.is_relative_to(rule["path"]) for rule in rules):
            raise RefusalError(500, *prefix, f"I/O error (path={path} op=open)", "Permission denied (os error 13)")

    def _lock(self, body: dict[str, Any], prefix: tuple[str, ...]) -> ExitStack:
        path, is_written = _lock_of(body)
        if not Path(path).exists():
            reasons = (
                "Cannot open disk path",
                f"I/O error (path={path} op=open)",
                "No such file or directory (os error 2)",
            )
            raise RefusalError(500, *prefix, *reasons)
        self._require_access(path, (*prefix, "Cannot open disk path"))
        file = _file_of(path)
        if any(file == other.file and (is_written or other.is_written) for other in self.locked):
            kind = "Write" if is_written else "Read"
            reason = f"Failed to get {kind} lock for disk image: {path}"
            raise RefusalError(
                500, *prefix, "Cannot lock images of all block devices", reason, "The file is already locked"
            )
        lock = Lock(_origin(path), file, is_written)
        self.locked.append(lock)
        held = ExitStack()
        held.callback(self.locked.remove, lock)
        return held

    def _keep(self, body: dict[str, Any], prefix: tuple[str, ...]) -> ExitStack:
        """Keep the descriptors of a tap; one that is no tap is closed."""
        held = ExitStack()
        for fd in body.get("fds") or ():
            held.callback(os.close, fd)
            try:
                ioctl(fd, _TUNGETIFF, bytes(_IFREQ_SIZE))
            except OSError as err:
                held.close()
                reason = f"{os.strerror(err.errno or 0)} (os error {err.errno})"
                reasons = (
                    "Cannot create virtio-net device",
                    "Using existing tap",
                    f"Ioctl failed ({_TUNGETIFF})",
                    reason,
                )
                raise RefusalError(500, *prefix, *reasons) from err
        return held

    def _map(self, body: dict[str, Any], prefix: tuple[str, ...]) -> ExitStack:
        """Open a file, which nobody locks."""
        self._require_access(str(body["file"]), prefix)
        fd = os.open(str(body["file"]), os.O_RDONLY)
        held = ExitStack()
        held.callback(os.close, fd)
        return held

    def _open_group(self, body: dict[str, Any], prefix: tuple[str, ...]) -> ExitStack:
        """Have a device of the host, once."""
        path = str(body["path"])
        device = Path(paths.sysfs(), Path(path).relative_to("/sys"))
        if not device.exists() or path in self.passed:
            reason = "Failed to open VFIO group" if device.exists() else "No such file or directory (os error 2)"
            raise RefusalError(500, *prefix, "Cannot create a VFIO device", reason)
        self.passed.append(path)
        held = ExitStack()
        held.callback(self.passed.remove, path)
        return held

    def _connect(self, body: dict[str, Any], prefix: tuple[str, ...]) -> ExitStack:
        """Connect to a vhost-user backend and ask for its features, as far as to know that it is there."""
        backend = socket.socket(socket.AF_UNIX)
        backend.settimeout(_BACKEND_TIMEOUT_S)
        reason = "Connection to socket failed"
        try:
            backend.connect(str(body.get("socket") or body["vhost_socket"]))
            reason = "Get features failed"
            backend.sendall(_GET_FEATURES)
            with backend.makefile("rb") as answers:  # virtiofsd sends the head and the rest apart
                if len(answers.read(_FEATURES_SIZE)) < _FEATURES_SIZE:
                    raise ConnectionResetError
        except OSError as err:
            backend.close()
            what = "vhost-user-blk" if body.get("vhost_user") else "virtio-fs"
            raise RefusalError(500, *prefix, f"Cannot create {what} device", reason) from err
        held = ExitStack()
        held.callback(backend.close)
        return held

    def _slot(self, name: str, body: dict[str, Any], prefix: tuple[str, ...]) -> int:
        """Return a free slot; a refusal comes too late for what the device has already."""
        segment = body.get("pci_segment", 0)
        taken = {device.slot for device in self.devices.values() if device.segment == segment}
        wanted = body.get("pci_device_id") if self.version >= "52" else None
        reason = ""
        if wanted in taken:
            reason = f"Valid PCI device identifier but already used: {wanted}"
        elif wanted is None:
            wanted = next((slot for slot in range(1, SLOTS) if slot not in taken), None)
            reason = "" if wanted else "Could not find an available device slot on the PCI bus"
        if reason:
            self.orphans.add(name)
            raise RefusalError(500, *prefix, "Failed to find an available PCI device ID", reason)
        assert wanted is not None
        return int(wanted)

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {name: {"id": name, "resources": [], "children": []} for name in self.orphans}
        for name, device in self.devices.items():
            if name.startswith("_vfio"):
                tree[name] = {"id": name, "resources": [], "children": [], "pci_bdf": _bdf(device)}
                continue
            wrapper = f"_virtio-pci-{name}"
            tree[name] = {"id": name, "resources": [], "parent": wrapper, "children": []}
            tree[wrapper] = {"id": wrapper, "resources": [], "children": [name], "pci_bdf": _bdf(device)}
        return tree


def _directory_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _file_of(path: str) -> tuple[int, int]:
    """Return which file it is, by whatever path."""
    found = Path(path).stat()
    return found.st_dev, found.st_ino


def _origin(path: str) -> str:
    """Return where a file is that may be bound to a path (proc_pid_mountinfo(5): root and mount point)."""
    mounted = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    bound = {fields[4]: fields[3] for fields in mounted}
    return bound.get(str(Path(path).resolve()), path)


def _lock_of(body: dict[str, Any]) -> tuple[str, bool]:
    return str(body["path"]), not body.get("readonly")


def _bdf(device: Device) -> str:
    return f"{device.segment:04x}:00:{device.slot:02x}.0"
