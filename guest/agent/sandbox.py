"""The sandbox: the directory that the host shares, and the containers.

The share is hot-plugged just before it is to be mounted, so the guest may not have seen it yet: mounting fails until
the driver has found the device, and is tried again whenever the kernel has news of a device.
"""

from __future__ import annotations

import errno

from common import status
from guest.agent import kernel
from guest.agent.files import make_directories, write_text
from guest.agent.log import log
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from common.protocols.agent import Storage
    from guest.agent.container import Container
    from guest.agent.ports import Uevents
    from guest.agent.process import Guest

STORAGE_DRIVER = "virtio-fs"
_FSTYPE = "virtiofs"
_DEVICE_TIMEOUT_S = 10
_KILL_TIMEOUT_S = 5


class Sandbox:
    """Owns the containers and the mounts of the guest."""

    def __init__(self, guest: Guest, uevents: Uevents) -> None:
        self.guest = guest
        self.containers: dict[str, Container] = {}
        self._uevents = uevents

    def container(self, container_id: str) -> Container:
        """Return a container.

        Raises:
            RpcError: there is none of that id.
        """
        found = self.containers.get(container_id)
        if found is None:
            raise RpcError(status.NOT_FOUND, f"container {container_id} does not exist")
        return found

    def set_hostname(self, hostname: str) -> None:
        """Name the guest."""
        write_text("/proc/sys/kernel/hostname", hostname)

    def mount(self, storages: list[Storage], done: Callable[[str], None]) -> None:
        """Mount one after the other; ``done`` gets an empty text or the first error."""
        if not storages:
            done("")
            return
        first, *others = storages
        check_storage(first)
        self._mount(first, lambda error: done(error) if error else self.mount(others, done))

    def destroy(self, done: Callable[[], None]) -> None:
        """End every container and call back: then all that they wrote is with the host.

        A share keeps nothing back: FUSE without a writeback cache hands on each write at once, and what was written to
        a mapping when its file is unmapped (fs/fuse/file.c, fuse_vma_close). So it is neither synced nor unmounted,
        either of which would have virtiofsd sync the host's whole file system.
        """
        left = set(self.containers)

        def finish() -> None:
            timer.cancel()
            done()

        def on_empty(container_id: str) -> None:
            left.discard(container_id)
            if not left:
                finish()

        # A process that the kernel cannot kill, since its file system does not answer, must not keep the VM.
        timer = self.guest.reactor.later(_KILL_TIMEOUT_S, finish)
        if not left:
            finish()
        for container in self.containers.values():
            container.end(on_empty)

    def _mount(self, storage: Storage, done: Callable[[str], None]) -> None:
        """Mount one storage as soon as its device is there."""
        make_directories(storage.mount_point)

        def attempt() -> None:
            error = _try_mount(storage)
            if error is None:
                return
            timer.cancel()
            self._uevents.unlisten(attempt)
            done(error)

        def give_up() -> None:
            self._uevents.unlisten(attempt)
            done(f"no {storage.driver} device with tag {storage.source!r} appeared within {_DEVICE_TIMEOUT_S} s")

        timer = self.guest.reactor.later(_DEVICE_TIMEOUT_S, give_up)
        self._uevents.listen(attempt)
        attempt()


def check_storage(storage: Storage) -> None:
    """Refuse a storage that this agent cannot mount.

    Raises:
        RpcError: it is not a virtio-fs share.
    """
    if storage.driver != STORAGE_DRIVER or storage.fstype != _FSTYPE:
        raise RpcError(
            status.UNIMPLEMENTED,
            f"storage {storage.source!r} of driver {storage.driver!r} and type {storage.fstype!r} is not supported",
        )
    if not storage.mount_point.startswith("/"):
        raise RpcError(status.INVALID_ARGUMENT, f"mount point {storage.mount_point!r} is not absolute")


def _try_mount(storage: Storage) -> str | None:
    """Return an empty text if it is mounted, an error if it cannot be, or None if its device is not there."""
    try:
        kernel.mount(storage.source, storage.mount_point, storage.fstype, options=",".join(storage.options))
    except OSError as err:
        if (
            err.errno == errno.EINVAL
        ):  # what virtio_fs_get_tree (fs/fuse/virtio_fs.c) says of a tag that it has not seen
            return None
        return f"cannot mount {storage.source!r} at {storage.mount_point}: {err}"
    log("info", "mounted", source=storage.source, target=storage.mount_point)
    return ""
