"""What the machine has: buses, block nodes, devices; and in which words it refuses.

Source of words and order: QEMU 7.2.22 itself, driven without a guest (tests/vm/test_fake_qemu.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_UNDER_ITS_NIC = " \\ "
PERIPHERALS = "/machine/peripheral"
OBJECTS = "/objects"
_ROOT_BUS = "pcie.0"


class RefusalError(Exception):
    """An answer that begins with ``error``.

    Attributes:
        kind: QMP's class.
        text: QEMU's words.
    """

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


@dataclass
class Device:
    """A device on a bus."""

    driver: str
    bus: str
    place: str
    drive: str
    netdev: str
    chardev: str
    memdev: str
    host: str
    is_leaving: bool = False


@dataclass
class Node:
    """An open file."""

    filename: str
    is_read_only: bool


@dataclass
class Machine:
    """A machine that was started with ``-device`` arguments.

    Attributes:
        buses: each bus's kind of controller, by name.
        tell: takes the events.
        lets_go: whether its guest lets devices go by itself.
        runstate: ``running`` or ``paused``.
        is_driven: whether its guest has a driver for the devices that it was started with.
        looks: how often somebody wanted to know.
    """

    buses: dict[str, str]
    tell: Callable[[str, dict[str, Any]], None]
    lets_go: bool = True
    runstate: str = "running"
    is_driven: bool = True
    looks: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    netdevs: set[str] = field(default_factory=set)
    objects: dict[str, str] = field(default_factory=dict)
    chardevs: dict[str, str] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)

    def status(self, _: dict[str, Any]) -> dict[str, object]:
        """Answer ``query-status``."""
        return {"running": self.runstate == "running", "singlestep": False, "status": self.runstate}

    def move(self, runstate: str) -> None:
        """Stop the guest's processors or let them go on; told only if that changes something."""
        if runstate != self.runstate:
            self.runstate = runstate
            self.tell("RESUME" if runstate == "running" else "STOP", {})

    def blockdev_add(self, arguments: dict[str, Any]) -> None:
        """Open a file; it is locked when a device uses it, and not before."""
        name, file = str(arguments["node-name"]), arguments["file"]
        _require_identifier(name, "Invalid node-name: '{}'")
        if name in self.nodes:
            raise RefusalError(f"Duplicate nodes with node-name='{name}'")
        self.nodes[name] = Node(str(file["filename"]), bool(arguments.get("read-only")))

    def blockdev_del(self, arguments: dict[str, Any]) -> None:
        """Close a file."""
        name = str(arguments["node-name"])
        if name not in self.nodes:
            raise RefusalError(f"Failed to find node with node-name='{name}'")
        if any(device.drive == name for device in self.devices.values()):
            raise RefusalError(f"Node {name} is in use")
        del self.nodes[name]

    def object_add(self, arguments: dict[str, Any]) -> None:
        """Make an object, for example a memory backend."""
        name = str(arguments["id"])
        if name in self.objects:
            raise RefusalError(f"attempt to add duplicate property '{name}' to object (type 'container')")
        self.objects[name] = str(arguments["qom-type"])

    def object_del(self, arguments: dict[str, Any]) -> None:
        """Unmake an object."""
        name = str(arguments["id"])
        if name not in self.objects:
            raise RefusalError(f"object '{name}' not found")
        if any(device.memdev == name for device in self.devices.values()):
            raise RefusalError(f"object '{name}' is in use, can not be deleted")
        del self.objects[name]

    def chardev_add(self, arguments: dict[str, Any]) -> None:
        """Connect to a socket; whether somebody listens there is not looked at, only whether it is there."""
        name, path = str(arguments["id"]), str(arguments["backend"]["data"]["addr"]["data"]["path"])
        if name in self.chardevs:
            raise RefusalError(f"Chardev with id '{name}' already exists")
        if not Path(path).exists():
            raise RefusalError(
                f"Failed to add chardev '{name}': Failed to connect to '{path}': No such file or directory"
            )
        self.chardevs[name] = path

    def chardev_remove(self, arguments: dict[str, Any]) -> None:
        """Close a connection."""
        name = str(arguments["id"])
        if name not in self.chardevs:
            raise RefusalError(f"Chardev '{name}' not found")
        if any(device.chardev == name for device in self.devices.values()):
            raise RefusalError(f"Chardev '{name}' is busy")
        del self.chardevs[name]

    def list_chardevs(self, _: dict[str, Any]) -> list[dict[str, object]]:
        """Answer ``query-chardev``."""
        return [{"frontend-open": True, "filename": "unix:", "label": name} for name in self.chardevs]

    def netdev_add(self, arguments: dict[str, Any]) -> None:
        """Open an interface; the descriptor that came with ``getfd`` is not looked at."""
        name = str(arguments["id"])
        if name in self.netdevs:
            raise RefusalError(f"Duplicate ID '{name}'")
        self.netdevs.add(name)

    def netdev_del(self, arguments: dict[str, Any]) -> None:
        """Close an interface, also under a device that has it."""
        name = str(arguments["id"])
        if name not in self.netdevs:
            raise RefusalError(f"Device '{name}' not found", "DeviceNotFound")
        self.netdevs.discard(name)

    def info_network(self, arguments: dict[str, Any]) -> str:
        """Answer the people's ``info network``, as far as interfaces go."""
        if arguments["command-line"] != "info network":
            raise RefusalError(f"unknown command: '{arguments['command-line']}'")
        used = {device.netdev for device in self.devices.values()}
        lines = [
            f"{_UNDER_ITS_NIC if name in used else ''}{name}: index=0,type=tap,fd=30" for name in sorted(self.netdevs)
        ]
        return "\r\n".join([*lines, ""])

    def device_add(self, arguments: dict[str, Any]) -> None:
        """Plug a device. Who names no address gets the next one, also behind a root port that is occupied."""
        name, bus = str(arguments["id"]), str(arguments["bus"])
        if bus not in self.buses:
            raise RefusalError(f"Bus '{bus}' not found")
        if bus == _ROOT_BUS:
            raise RefusalError(f"Bus '{bus}' does not support hotplugging")
        _require_identifier(name, "Parameter 'id' expects an identifier")
        if name in self.devices:
            raise RefusalError(f"Duplicate device ID '{name}'")
        device = Device(
            str(arguments["driver"]),
            bus,
            self._place(bus, arguments),
            str(arguments.get("drive", "")),
            str(arguments.get("netdev", "")),
            str(arguments.get("chardev", "")),
            str(arguments.get("memdev", "")),
            str(arguments.get("host", "")),
        )
        if device.drive and device.drive not in self.nodes:
            raise RefusalError(f"Property '{_inner(device.driver)}.drive' can't find value '{device.drive}'")
        self._require_netdev(device)
        self._require_chardev(device)
        self._require_free(device)
        self._require_memdev(device)
        self._require_host(device)
        self._require_unlocked(name, device)
        self.devices[name] = device

    def virtio_status(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Answer ``x-query-virtio-status`` of a device whose back end is another process."""
        path = str(arguments["path"])
        if not path.startswith(PERIPHERALS):
            raise RefusalError(f"Path {path} is not a VirtIODevice")
        self.looks += 1
        return {"vhost-started": self.is_driven}

    def drive(self, _: dict[str, Any]) -> None:
        """Have the guest load its drivers."""
        self.is_driven = True

    def device_del(self, arguments: dict[str, Any]) -> None:
        """Ask the guest to let a device go; a SCSI device goes at once."""
        name = str(arguments["id"])
        device = self.devices.get(name)
        if device is None:
            raise RefusalError(f"Device '{name}' not found", "DeviceNotFound")
        if device.is_leaving:
            raise RefusalError(f"Device {name} is already in the process of unplug")
        if device.memdev:
            raise RefusalError("virtio based memory devices cannot be unplugged.")
        device.is_leaving = True
        if self.buses[device.bus] == "virtio-scsi-pci":
            self.let_go(name)

    def let_go(self, name: str) -> None:
        """Have the guest let a device go: two events for one with an inner half."""
        device = self.devices.pop(name)
        path = f"{PERIPHERALS}/{name}"
        if device.driver.startswith("virtio-"):
            self.tell("DEVICE_DELETED", {"path": f"{path}/virtio-backend"})
        self.tell("DEVICE_DELETED", {"device": name, "path": path})

    def leaving(self) -> list[str]:
        """Return which devices the guest lets go now, of those that it was asked for."""
        willing = self.lets_go and self.runstate == "running"
        return [name for name, device in self.devices.items() if device.is_leaving and willing]

    def peripherals(self, _: dict[str, Any]) -> list[dict[str, str]]:
        """Answer ``qom-list`` of the hot-plugged devices."""
        listed = [{"name": name, "type": f"child<{device.driver}>"} for name, device in self.devices.items()]
        return [{"name": "type", "type": "string"}, *listed]

    def named_nodes(self, _: dict[str, Any]) -> list[dict[str, object]]:
        """Answer ``query-named-block-nodes``."""
        return [
            {"node-name": name, "file": node.filename, "ro": node.is_read_only, "drv": "raw"}
            for name, node in self.nodes.items()
        ]

    def _place(self, bus: str, arguments: dict[str, Any]) -> str:
        if self.buses[bus] == "virtio-scsi-pci":
            return f"{arguments.get('scsi-id', 0)}:{arguments.get('lun', 0)}"
        if "addr" in arguments:
            return str(int(str(arguments["addr"]), 0))
        taken = {device.place for device in self.devices.values() if device.bus == bus}
        return next(str(slot) for slot in range(len(taken) + 1) if str(slot) not in taken)

    def _require_netdev(self, device: Device) -> None:
        if not device.netdev:
            return
        named = f"Property '{_inner(device.driver)}.netdev'"
        if device.netdev not in self.netdevs:
            raise RefusalError(f"{named} can't find value '{device.netdev}'")
        if any(other.netdev == device.netdev for other in self.devices.values()):
            raise RefusalError(f"{named} can't take value '{device.netdev}', it's in use")

    def _require_chardev(self, device: Device) -> None:
        if not device.chardev:
            return
        named = f"Property '{_inner(device.driver)}.chardev'"
        if device.chardev not in self.chardevs:
            raise RefusalError(f"{named} can't find value '{device.chardev}'")
        if any(other.chardev == device.chardev for other in self.devices.values()):
            raise RefusalError(f"{named} can't take value '{device.chardev}': Device '{device.chardev}' is in use")

    def _require_memdev(self, device: Device) -> None:
        if device.memdev and device.memdev not in self.objects:
            raise RefusalError(f"Device '{device.memdev}' not found", "DeviceNotFound")
        if device.memdev and any(other.memdev == device.memdev for other in self.devices.values()):
            raise RefusalError(f"can't use already busy memdev: {device.memdev}")

    def _require_host(self, device: Device) -> None:
        """Refuse a device of the host that is not there, or that another one has."""
        if not device.host:
            return
        named = f"vfio /sys/bus/pci/devices/{device.host}"
        if not (Path(paths.sysfs()) / "bus/pci/devices" / device.host).exists():
            raise RefusalError(f"{named}: no such host device: No such file or directory")
        if any(other.host == device.host for other in self.devices.values()):
            raise RefusalError(f"{named}: device is already attached")

    def _require_free(self, device: Device) -> None:
        for name, other in self.devices.items():
            if (other.bus, other.place) != (device.bus, device.place):
                continue
            if self.buses[device.bus] == "virtio-scsi-pci":
                raise RefusalError(f"lun already used by '{name}'")
            raise RefusalError(
                f"PCI: slot {device.place} function 0 not available for {device.driver}, "
                f"in use by {other.driver},id={name}"
            )

    def _require_unlocked(self, name: str, device: Device) -> None:
        """Refuse a second writer of a node, or of a file (``file.locking``)."""
        node = self.nodes.get(device.drive)
        for other_name, other in self.devices.items():
            other_node = self.nodes.get(other.drive)
            if node is None or other_node is None or (node.is_read_only and other_node.is_read_only):
                continue
            if other.drive == device.drive:
                raise RefusalError(
                    f"Permission conflict on node '{device.drive}': permissions 'write' are both required by "
                    f"{_user(other_name, device.drive)} and unshared by {_user(name, device.drive)}."
                )
            if other_node.filename == node.filename:
                raise RefusalError(f'Failed to get {"shared " if node.is_read_only else ""}"write" lock')


def buses_of(argv: Iterable[str]) -> dict[str, str]:
    """Return the buses that a command line makes, by name, each with its controller."""
    buses = {_ROOT_BUS: "pcie"}
    for argument in argv:
        controller, _, options = argument.partition(",")
        name = dict(option.split("=", 1) for option in options.split(",") if "=" in option).get("id", "")
        if controller in {"pcie-root-port", "pci-bridge"}:
            buses[name] = controller
        elif controller == "virtio-scsi-pci":
            buses[f"{name}.0"] = controller
    return buses


def _inner(driver: str) -> str:
    """Return which half of a device has what it stands on."""
    inner = driver.removesuffix("-pci")
    return f"{inner}-device" if driver.startswith("virtio-") else inner


def _user(name: str, drive: str) -> str:
    return f"block device '{PERIPHERALS}/{name}/virtio-backend' (uses node '{drive}' as 'root' child)"


def _require_identifier(name: str, text: str) -> None:
    """Refuse what is no identifier (``id_wellformed`` in util/id.c): a letter, then letters, digits, ``-._``."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9\-._]*", name):
        raise RefusalError(text.format(name))
