"""Disks: found in sysfs by where they are plugged and by the serial that the host gave this attach.

A slot may be used again, and a name like ``/dev/vda`` is the first free one; neither says which disk it is. Both are
looked at, and only a disk with the right serial counts. A host that gives no serial (upstream's) has only the place.

Some hypervisors tell a guest nothing of what comes and goes on PCI. There it has to look itself, and to let a device go
before it is taken away; one that was taken away before is dead, and hides what comes into its slot next. A dead disk
must not even be asked for its serial or removed: there would never be an answer (docs/hypervisors/firecracker.md).

::

    /sys/devices/pci0000:00/0000:00:04.0/0000:01:01.0/virtio3/block/vda      PCI path 04/01
    /sys/devices/pci0001:00/0001:00:05.0/virtio5/block/vdc                   PCI path 0001:05, of another segment
    …/virtio4/ndbus0/region0/namespace0.0/block/pmem0                        persistent memory at a PCI path
    /sys/bus/scsi/devices/2:0:0:5/block/sda                                  SCSI address 0:5
    /sys/block/vda                                                           a drive that is never unplugged

Sources: Documentation/ABI/stable/sysfs-block of Linux (``serial``), Documentation/scsi/scsi_mid_low_api.rst (``scan``,
``delete``), SPC-4 7.8.15 for the unit serial number page: four bytes of header, then the serial.
"""

from __future__ import annotations

import errno
import posix

from common import status
from guest.agent.files import read_bytes, read_text, write_text
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_DEVICES = "/sys/devices"
_FIRST_SEGMENT = "0000"
_PCI_RESCAN = "/sys/bus/pci/rescan"
_SCSI_DEVICES = "/sys/bus/scsi/devices"
_SCSI_HOSTS = "/sys/class/scsi_host"
_SERIAL_PAGE_HEADER = 4

_found: dict[str, str] = {}
"""The serial of the disk that was found last at each PCI path where nobody tells."""


def find_by_pci_path(path: str, serial: str) -> str | None:
    """Return the node of the virtio disk at a PCI path, or None if it is not there (yet).

    Raises:
        RpcError: that is no PCI path.
    """
    directory = pci_device(path)
    device = _child(directory, "", "virtio") if directory else None
    name = _first(f"{device}/block") if device else None
    return _node(name, serial, _virtio_serial) if name else None


def find_pmem(source: str) -> str | None:
    """Return the node of the persistent memory at a PCI path, or None if it is not there (yet). It has no serial.

    Args:
        source: the path; or the node, which upstream's shim supposes.

    Raises:
        RpcError: that is no PCI path.
    """
    if source.startswith("/dev/"):
        return _node(source.rpartition("/")[2], "", read_bytes)
    directory = pci_device(source)
    for beginning, ending in (("virtio", ""), ("ndbus", ""), ("region", ""), ("namespace", ".0")):
        directory = _child(directory, ending, beginning) if directory else None
    name = _first(f"{directory}/block") if directory else None
    return _node(name, "", read_bytes) if name else None


def look_for_pci(path: str, serial: str) -> None:
    """Have the kernel look for a disk that nobody has told it of.

    Raises:
        RpcError: that is no PCI path.
        OSError: the kernel still has the disk that was there before, which is dead.
    """
    is_known = pci_device(path) is not None
    before = _found.get(path, serial)
    if is_known and before != serial:
        raise OSError(errno.EBUSY, f"disk {before} was taken from PCI slot {path} before it was let go")
    if not is_known:
        write_text(_PCI_RESCAN, "1")
    _found[path] = serial


def is_looked_for(path: str, serial: str) -> bool:
    """Return whether :func:`look_for_pci` was about this disk.

    Raises:
        RpcError: that is no PCI path.
    """
    pci_device(path)
    return _found.get(path) == serial


def let_go_of_pci(path: str, serial: str) -> None:
    """Have the kernel give up a disk at a PCI path. The hypervisor takes it away without asking.

    Raises:
        RpcError: that is no PCI path.
        OSError: the kernel still has the disk that was there before, which is dead.
    """
    device = pci_device(path)
    if device is not None:
        before = _found.get(path, serial)
        if before != serial:
            raise OSError(errno.EBUSY, f"PCI slot {path} has disk {before}")
        write_text(f"{device}/remove", "1")
    _found.pop(path, None)


def find_by_serial(source: str, serial: str, sectors: str) -> str | None:
    """Return the node of the virtio disk with a serial, or None if there is none (yet).

    Args:
        source: the node that the host supposes; it counts if there is no serial.
        serial: of the disk.
        sectors: its size; an exchanged disk has it when the kernel has heard. Empty if it does not count.
    """
    names = [name for name in _names("/sys/block") if name.startswith("vd")] if serial else [source.rpartition("/")[2]]
    for name in names:
        node = _node(name, serial, _virtio_serial)
        if node is not None and (not sectors or read_text(f"/sys/block/{name}/size").strip() == sectors):
            return node
    return None


def find_by_scsi_address(address: str, serial: str) -> str | None:
    """Return the node of the SCSI disk at ``<target>:<lun>``, or None if it is not there (yet).

    Raises:
        RpcError: that is no SCSI address.
    """
    target, lun = _scsi_numbers(address)
    device = _child(_SCSI_DEVICES, f":0:{target}:{lun}")
    name = _first(f"{device}/block") if device else None
    return _node(name, serial, _scsi_serial) if name else None


def scan_scsi(address: str) -> None:
    """Have the kernel look for a disk, which it does not by itself if it was started so (``scsi_mod.scan=none``)."""
    target, lun = _scsi_numbers(address)
    for host in _names(_SCSI_HOSTS):
        write_text(f"{_SCSI_HOSTS}/{host}/scan", f"0 {target} {lun}")


def let_go_of_scsi(node: str) -> None:
    """Have the kernel give a SCSI disk up. The hypervisor takes it away without asking."""
    try:
        write_text(f"/sys/block/{node.rpartition('/')[2]}/device/delete", "1")
    except FileNotFoundError:
        return  # it has gone already


def pci_device(path: str) -> str | None:
    """Return the directory of what the kernel knows at a PCI path, or None if there is nothing (yet).

    Raises:
        RpcError: that is no PCI path.
    """
    segment, _, slots = path.rpartition(":")
    directory: str | None = f"{_DEVICES}/pci{_hexadecimal(path, segment or _FIRST_SEGMENT, 4)}:00"
    for part in slots.split("/"):
        directory = _child(directory, f":{_slot(path, part)}") if directory else None
    return directory


def _slot(path: str, part: str) -> str:
    """Return a part of a PCI path, ``04`` or ``04.0``, as sysfs writes it."""
    slot, _, function = part.partition(".")
    return f"{_hexadecimal(path, slot, 2)}.{_hexadecimal(path, function or '0', 1)}"


def _hexadecimal(path: str, number: str, digits: int) -> str:
    """Return a number in a PCI path as sysfs writes it."""
    try:
        return f"{int(number, 16):0{digits}x}"
    except ValueError:
        raise RpcError(status.INVALID_ARGUMENT, f"{path!r} is not a PCI path") from None


def _scsi_numbers(address: str) -> tuple[int, int]:
    target, _, lun = address.partition(":")
    try:
        return int(target), int(lun)
    except ValueError:
        raise RpcError(status.INVALID_ARGUMENT, f"{address!r} is not a SCSI address") from None


def _names(directory: str) -> list[str]:
    """Return what is in a directory of the kernel; nothing if it has gone or never was."""
    try:
        return sorted(posix.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _child(directory: str, ending: str, beginning: str = "") -> str | None:
    for name in _names(directory):
        if name.startswith(beginning) and name.endswith(ending):
            return f"{directory}/{name}"
    return None


def _first(directory: str) -> str | None:
    return next(iter(_names(directory)), None)


def _virtio_serial(name: str) -> bytes:
    return read_bytes(f"/sys/block/{name}/serial")


def _scsi_serial(name: str) -> bytes:
    return read_bytes(f"/sys/block/{name}/device/vpd_pg80")[_SERIAL_PAGE_HEADER:]


def _node(name: str, serial: str, read_serial: Callable[[str], bytes]) -> str | None:
    """Return a disk's node if it is complete and the one that is meant."""
    node = f"/dev/{name}"
    try:
        posix.stat(node)
        found = read_serial(name).strip(b"\0 \n").decode(errors="replace") if serial else ""
    except OSError:  # it comes or goes just now: there will be news
        return None
    return node if found == serial else None
