"""Storages: what the host plugs and the guest mounts, and how it is given back.

A device is hot-plugged while the guest boots, or just before it is to be mounted, so the guest may not have seen it
yet: each attempt to mount that finds no device is repeated whenever the kernel has news of one, and never by time.

Which drivers there are is a table. ``blk``, ``scsi``, ``mmioblk`` and ``nvdimm`` are named, and their sources written,
as upstream's agent has them. What else the host says comes as driver options, which upstream's agent does not look at:

================  =====================================================================================================
serial=<serial>   the disk's
sectors=<number>  its size in sectors of 512 bytes (``mmioblk``)
untold            the guest hears nothing of this disk: it has to look for it, and to let it go by itself (``blk``)
================  =====================================================================================================

A storage of type ``bind`` is a disk's node itself, at a mount point that is a file, and not a file system on it
(:mod:`guest.agent.devices`).
"""

from __future__ import annotations

import errno
import posix

from common import status
from common.mount_options import MS_BIND, parse_options
from common.protocols.agent import OVERLAY_DIRECTORY
from guest.agent import kernel, modules
from guest.agent.files import make_directories, write_text
from guest.agent.log import log
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from common.protocols.agent import Storage
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor

    Done = Callable[[str], None]

_S_ISGID = 0o2000

BIND = "bind"
"""The type of a storage that is not a file system (upstream's shim names it so)."""

_DEVICE_TIMEOUT_S = 10
_READ_AHEAD_KIB = "1024"
"""What one FUSE request can carry (FUSE_MAX_MAX_PAGES, fs/fuse/fuse_i.h); the kernel's own choice is an eighth."""

_NOT_YET = {"virtio-fs": errno.EINVAL, **dict.fromkeys(("blk", "scsi", "mmioblk", "nvdimm"), errno.ENXIO)}
"""What mount(2) and open(2) say of a device that is not complete: virtio_fs_get_tree (fs/fuse/virtio_fs.c) of a tag
that it has not seen, and blkdev_get_no_open (block/bdev.c) of a disk whose node is there before it can be opened
(block/genhd.c, device_add_disk). There will be news of it."""


class Driver:
    """One kind of storage."""

    module = ""
    """For which purpose modules are needed (``modules``)."""
    keeps_writes = True
    """Whether what was written may still be in the guest's memory."""

    def look_for(self, storage: Storage) -> None:
        """Have the kernel look for the device, if it would not by itself."""

    def source(self, storage: Storage) -> str | None:
        """Return what to mount, or None if it is not there yet.

        Raises:
            RpcError: the storage names no device.
        """
        raise NotImplementedError

    def mount(self, source: str, storage: Storage) -> None:
        """Have it at its mount point.

        Raises:
            OSError: as mount(2) fails.
        """
        flags, data = parse_options(storage.options)
        if storage.fstype == BIND:
            flags |= MS_BIND
            posix.close(posix.open(source, posix.O_RDONLY | posix.O_CLOEXEC))  # fails until the disk is complete
        kernel.mount(source, storage.mount_point, storage.fstype, flags, data)

    def unmount(self, mount_point: str) -> None:
        """Take it from there.

        Raises:
            OSError: something uses it.
        """
        kernel.unmount(mount_point)

    def tune(self, mount_point: str) -> None:
        """Set what the mounted file system does not set by itself."""

    def let_go(self, source: str, storage: Storage) -> None:
        """Give the device up, as far as the host cannot ask for that."""


class VirtioFs(Driver):
    """A directory of the host, by tag. Only the attempt to mount it tells whether it is there.

    FUSE without a writeback cache hands on each write at once, and what was written to a mapping when its file is
    unmapped (fs/fuse/file.c, fuse_vma_close); to unmount it would have virtiofsd sync the host's whole file system.
    """

    keeps_writes = False

    def source(self, storage: Storage) -> str | None:
        """Return the tag."""
        return storage.source

    def tune(self, mount_point: str) -> None:
        """Read ahead as much as one request can carry: each request goes to the host and back."""
        device = posix.stat(mount_point).st_dev
        write_text(f"/sys/class/bdi/{posix.major(device)}:{posix.minor(device)}/read_ahead_kb", _READ_AHEAD_KIB)


class Blk(Driver):
    """A virtio disk, by PCI path."""

    module = "blk"

    def look_for(self, storage: Storage) -> None:
        """Rescan, if nobody tells."""
        if _is_untold(storage):
            from guest.agent import block

            block.look_for_pci(storage.source, _option(storage, "serial"))

    def source(self, storage: Storage) -> str | None:
        """Return the disk's node."""
        from guest.agent import block

        serial = _option(storage, "serial")
        if _is_untold(storage) and not block.is_looked_for(storage.source, serial):
            return None  # what is there may be dead
        return block.find_by_pci_path(storage.source, serial)

    def let_go(self, source: str, storage: Storage) -> None:
        """Remove the device, if nobody asks for that."""
        if _is_untold(storage):
            from guest.agent import block

            block.let_go_of_pci(storage.source, _option(storage, "serial"))


class MmioBlk(Driver):
    """A virtio disk that has been there since the boot and whose content is exchanged, by serial and size."""

    module = "blk"

    def source(self, storage: Storage) -> str | None:
        """Return the disk's node."""
        from guest.agent import block

        return block.find_by_serial(storage.source, _option(storage, "serial"), _option(storage, "sectors"))


class Scsi(Driver):
    """A SCSI disk, by address."""

    module = "scsi"

    def look_for(self, storage: Storage) -> None:
        """Scan for it."""
        from guest.agent import block

        block.scan_scsi(storage.source)

    def source(self, storage: Storage) -> str | None:
        """Return the disk's node."""
        from guest.agent import block

        return block.find_by_scsi_address(storage.source, _option(storage, "serial"))

    def let_go(self, source: str, storage: Storage) -> None:
        """Delete the SCSI device."""
        from guest.agent import block

        block.let_go_of_scsi(source)


class Nvdimm(Driver):
    """Persistent memory, by PCI path."""

    module = "pmem"

    def source(self, storage: Storage) -> str | None:
        """Return its node."""
        from guest.agent import block

        return block.find_pmem(storage.source)


class Ephemeral(Driver):
    """A file system in the guest's memory (tmpfs, hugetlbfs), for example what upstream's shim has for ``/dev/shm``."""

    keeps_writes = False

    def source(self, storage: Storage) -> str | None:
        """Return its name, which is only shown."""
        return storage.source


class Local(Driver):
    """A directory of the guest's own that containers share, for example what upstream's shim has for an emptyDir.

    Options are those of upstream's agent: ``mode``, octal, and ``fsgid``, a group to which the directory is given. It
    stays until the guest ends: another container may use it.
    """

    keeps_writes = False

    def source(self, storage: Storage) -> str | None:
        """Return the directory.

        Raises:
            RpcError: an option is no number.
        """
        _local_options(storage)
        return storage.mount_point

    def mount(self, source: str, storage: Storage) -> None:
        """Give the directory, which is there, its group and mode."""
        mode, group = _local_options(storage)
        if group is not None:
            posix.chown(source, -1, group)
        if mode is not None:
            posix.chmod(source, mode if group is None else mode | _S_ISGID)

    def unmount(self, mount_point: str) -> None:
        """Leave it."""


class Overlay(Driver):
    """Storages one over the other. Directories in them that it needs are named by driver options, as upstream does."""

    def look_for(self, storage: Storage) -> None:
        """Make those directories."""
        for option in storage.driver_options:
            name, _, path = option.partition("=")
            if name == OVERLAY_DIRECTORY:
                make_directories(path)

    def source(self, storage: Storage) -> str | None:
        """Return its name, which is only shown."""
        return storage.source


DRIVERS: dict[str, Driver] = {
    "virtio-fs": VirtioFs(),
    "blk": Blk(),
    "scsi": Scsi(),
    "mmioblk": MmioBlk(),
    "nvdimm": Nvdimm(),
    "ephemeral": Ephemeral(),
    "local": Local(),
    "overlayfs": Overlay(),
}


class Mounted:
    """A storage that is mounted."""

    def __init__(self, storage: Storage, source: str, driver: Driver) -> None:
        self.mount_point = storage.mount_point
        self._storage = storage
        self._source = source
        self._driver = driver

    def is_on(self, disk: Storage) -> bool:
        """Return whether it is on a disk."""
        return _is_same_disk(self._storage, disk)

    def unmount(self) -> None:
        """Write back what is written, unmount, give the device up.

        Raises:
            OSError: something still uses it; the device stays the guest's.
        """
        self._driver.unmount(self.mount_point)
        self._driver.let_go(self._source, self._storage)

    def unmount_at_the_end(self) -> None:
        """See to it that the host has all that was written, whoever still uses it: the guest ends."""
        if not self._driver.keeps_writes:
            return
        try:
            kernel.unmount(self.mount_point)
        except OSError:
            kernel.unmount(self.mount_point, kernel.MNT_DETACH)


class Storages:
    """Mounts storages, each as soon as its device is there."""

    def __init__(self, reactor: Reactor, uevents: Uevents) -> None:
        self._reactor = reactor
        self._uevents = uevents
        self._awaited: list[Storage] = []

    def is_awaited(self, disk: Storage) -> bool:
        """Return whether something is to be mounted as soon as a disk is there."""
        return any(_is_same_disk(storage, disk) for storage in self._awaited)

    def mount(self, storages: list[Storage], mounted: list[Mounted], done: Done) -> None:
        """Mount one after the other.

        Args:
            storages: what to mount.
            mounted: takes what is mounted, as it is.
            done: gets an empty text, or the first error.
        """
        if not storages:
            done("")
            return
        first, *others = storages
        self._mount(first, mounted, lambda error: done(error) if error else self.mount(others, mounted, done))

    def _mount(self, storage: Storage, mounted: list[Mounted], done: Done) -> None:
        driver = DRIVERS[storage.driver]
        try:
            modules.load(driver.module)
            modules.load(storage.fstype)
            _make_mount_point(storage)
            driver.look_for(storage)
        except OSError as err:
            done(f"cannot prepare to mount {storage.source!r} at {storage.mount_point}: {err}")
            return

        def end() -> None:
            self._uevents.unlisten(attempt)
            self._awaited.remove(storage)

        def attempt() -> None:
            source = driver.source(storage)
            error = None if source is None else _try_mount(driver, source, storage)
            if source is None or error is None:
                return
            timer.cancel()
            end()
            if error:
                driver.let_go(source, storage)  # before the host hears that it was in vain and takes it away
            else:
                mounted.append(Mounted(storage, source, driver))
            done(error)

        def give_up() -> None:
            end()
            done(f"no {storage.driver} device {_name(storage)} appeared within {_DEVICE_TIMEOUT_S} s")

        timer = self._reactor.later(_DEVICE_TIMEOUT_S, give_up)
        self._uevents.listen(attempt)
        self._awaited.append(storage)
        attempt()


def let_go(disk: Storage) -> None:
    """Give up a disk that nothing is mounted of.

    Raises:
        RpcError: the storage names no device.
        OSError: the kernel cannot.
    """
    driver = DRIVERS[disk.driver]
    driver.let_go(driver.source(disk) or "", disk)


def check(storages: list[Storage]) -> None:
    """Refuse what this agent cannot mount, before anything is.

    Raises:
        RpcError: why.
    """
    for storage in storages:
        if storage.driver not in DRIVERS:
            raise RpcError(
                status.UNIMPLEMENTED, f"storage {storage.source!r} of driver {storage.driver!r} is not supported"
            )
        if not storage.mount_point.startswith("/"):
            raise RpcError(status.INVALID_ARGUMENT, f"mount point {storage.mount_point!r} is not absolute")
        DRIVERS[storage.driver].source(storage)


def _local_options(storage: Storage) -> tuple[int | None, int | None]:
    """Return mode and group of a directory, as far as they are said.

    Raises:
        RpcError: they are no numbers.
    """
    said = dict(option.partition("=")[::2] for option in storage.options)
    try:
        mode = int(said["mode"], 8) if "mode" in said else None
        group = int(said["fsgid"]) if "fsgid" in said else None
    except ValueError as err:
        raise RpcError(status.INVALID_ARGUMENT, f"local storage {storage.mount_point}: {err}") from err
    return mode, group


def _option(storage: Storage, name: str) -> str:
    """Return the value of a driver option, or nothing."""
    options = (option.partition("=") for option in storage.driver_options)
    return next((value for key, _, value in options if key == name), "")


def _is_same_disk(one: Storage, other: Storage) -> bool:
    return (one.driver, one.source) == (other.driver, other.source)


def _is_untold(storage: Storage) -> bool:
    return "untold" in storage.driver_options


def _name(storage: Storage) -> str:
    serial = _option(storage, "serial")
    return f"{storage.source!r} with serial {serial}" if serial else repr(storage.source)


def _make_mount_point(storage: Storage) -> None:
    if storage.fstype == BIND:
        make_directories(storage.mount_point.rpartition("/")[0])
        write_text(storage.mount_point, "")
    else:
        make_directories(storage.mount_point)


def _try_mount(driver: Driver, source: str, storage: Storage) -> str | None:
    """Return an empty text if it is mounted, an error if it cannot be, or None if its device is not there."""
    try:
        driver.mount(source, storage)
        driver.tune(storage.mount_point)
    except OSError as err:
        if err.errno == _NOT_YET.get(storage.driver):
            return None
        return f"cannot mount {storage.fstype} {source!r} at {storage.mount_point}: {posix.strerror(err.errno or 0)}"
    log("info", "mounted", source=source, target=storage.mount_point)
    return ""
