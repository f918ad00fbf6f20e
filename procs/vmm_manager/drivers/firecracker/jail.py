"""The jail of one VM: what Firecracker sees of the host, and as whom it runs.

::

    vm/jail/                                  a tmpfs of its own: small, without symbolic links that anybody follows
        firecracker/<id>/root/                the root of Firecracker's file system; its own user's
            firecracker                       the program, copied by the jailer
            kernel, initrd                    bound from the host until the VM has started
            placeholder                       one sector, for drives that hold no disk
            api, vsock                        Firecracker's sockets
            log, metrics                      FIFOs
            disk_7                            a disk's node, while Firecracker opens it
            state, memory                     a snapshot's files, while it writes or opens them

*A file system of its own.* The run directory is often mounted ``nodev`` and ``noexec``, and a jail needs both; what
Firecracker could write is bounded; and ``nosymfollow`` keeps it from leading us elsewhere by a link of its making. It
is unmounted with all else below the sandbox's directory, by whoever cleans up.

*A user of its own.* No two VMs of this host share one: the lowest that owns no jail, from a range that systemd's
UIDS-GIDS document leaves to nobody. *A network of its own*: an empty network namespace that ends with the process, in
which a tap is only until Firecracker has opened it (``kinds``).
*A cgroup*: the sandbox's, entered before the jailer runs.

*Disks* (docs/adr/0023-disks-in-a-jail.md) are device nodes of the jail's own, with its user as their owner: the host's
node or file keeps its owner. A file gets a loop device, which the kernel frees when Firecracker closes it. The node is
removed as soon as Firecracker has opened it.

Sources: docs/jailer.md of Firecracker; mount(2) and mount(8) for ``nosymfollow`` (Linux 5.10).
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import paths
from common.errors import UsageError
from common.linux import loop, mount_namespace, mounts
from procs.vmm_manager.drivers.firecracker.boot import INITRD, KERNEL, PLACEHOLDER
from procs.vmm_manager.drivers.sources import is_block_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config import FirecrackerConfig
    from common.services.vmm import BlockSpec

SECTOR = 512
_FIRST_UID = 0x70000000
_TMPFS = "mode=0755,size=64m,nr_inodes=256"
_NOSYMFOLLOW = 256
"""``MS_NOSYMFOLLOW`` of <linux/mount.h>."""
_MAX_ID = 64
"""Characters of an id (``MAX_INSTANCE_ID_LEN`` of Firecracker); they are letters, digits and hyphens."""
_SERIAL_SIZE = 20


class Lent(NamedTuple):
    """A disk in the jail.

    Attributes:
        serial: what Firecracker tells the guest: numbers of the node (``build_device_id`` in
            src/vmm/src/devices/virtio/block/virtio/device.rs). The node's own is never used twice in one tmpfs.
        sectors: the disk's size, in sectors of 512 bytes.
    """

    serial: str
    sectors: int


class Jail:
    """See the module.

    Args:
        sandbox_id: whose.
        config: where programs, kernel and initrd are.

    Attributes:
        root: the jail's root, as the host sees it.
    """

    def __init__(self, sandbox_id: str, config: FirecrackerConfig) -> None:
        self._id = "".join(char if char.isascii() and char.isalnum() else "-" for char in sandbox_id)[:_MAX_ID]
        self._config = config
        self._mount = Path(paths.vm_dir(sandbox_id)) / "jail"
        self.root = self._mount / Path(config.path).name / self._id / "root"

    @property
    def owner(self) -> int:
        """The user that Firecracker runs as."""
        return self.root.stat().st_uid

    def make(self) -> None:
        """Make it, without the program, which the jailer copies.

        Raises:
            UsageError: kernel or initrd cannot be read by who runs the VM.
            OSError: something cannot be made; it goes with the VM's directory.
        """
        uid = _free_uid() if self._config.jailer_path else 0
        self._mount.mkdir(mode=0o700)
        mounts.mount("tmpfs", str(self._mount), "tmpfs", mounts.MS_NOSUID | _NOSYMFOLLOW, _TMPFS)
        self.root.mkdir(parents=True)
        os.chown(self.root, uid, uid)
        for name, source in ((KERNEL, self._config.kernel), (INITRD, self._config.initrd)):
            self._bind(source, name, is_for_root=uid == 0)
        placeholder = self.root / PLACEHOLDER
        placeholder.write_bytes(bytes(SECTOR))
        self.hand_over(PLACEHOLDER)

    def hand_over(self, name: str) -> None:
        """Give a file of the jail to its user."""
        owner = self.root.stat()
        os.chown(self.root / name, owner.st_uid, owner.st_gid, follow_symlinks=False)

    def argv(self, *arguments: str) -> list[str]:
        """Return the command that runs Firecracker in the jail, with its arguments; its pid is the command's."""
        config, owner = self._config, self.root.stat()
        if not config.jailer_path:
            return ["/usr/bin/env", f"--chdir={self.root}", config.path, "--id", self._id, *arguments]
        return [
            *("/usr/bin/unshare", "--net", "--", config.jailer_path),
            *("--id", self._id, "--exec-file", config.path, "--chroot-base-dir", str(self._mount)),
            *("--uid", str(owner.st_uid), "--gid", str(owner.st_gid)),
            "--",
            *arguments,
        ]

    def forget_boot(self) -> None:
        """Take kernel and initrd out, which the VM has read: each mount makes the next jailer slower."""
        for name in (KERNEL, INITRD):
            mounts.unmount(str(self.root / name))
            (self.root / name).unlink()

    @contextmanager
    def lent(self, name: str, spec: BlockSpec) -> Iterator[Lent]:
        """A disk under a name in the jail, for as long as it takes Firecracker to open it.

        Raises:
            UsageError: the source is no disk.
            OSError: it cannot be opened.
        """
        node = self.root / name
        with ExitStack() as undo:
            device = _device(spec, undo)
            os.mknod(node, stat.S_IFBLK | 0o600, device)
            undo.callback(node.unlink)
            self.hand_over(name)
            made = node.lstat()
            serial = f"{made.st_dev}{made.st_rdev}{made.st_ino}"[:_SERIAL_SIZE]
            yield Lent(serial, _sectors(device))

    @contextmanager
    def written(self, pid: int, name: str, file: Path) -> Iterator[None]:
        """A new file of the host under a name in the jail of a process, for its user to write; then it is root's again.

        Raises:
            OSError: it is there already, or cannot be made.
        """
        owner = self.root.stat()
        file.touch(mode=0o600, exist_ok=False)
        os.chown(file, owner.st_uid, owner.st_gid)
        try:
            with self._bound(pid, name, file, 0):
                yield
        finally:
            os.chown(file, 0, 0)
            file.chmod(0o644)

    @contextmanager
    def read(self, pid: int, name: str, file: Path) -> Iterator[None]:
        """A file of the host that everybody may read under a name in the jail, for as long as it takes to be opened.

        Raises:
            OSError: there is none.
        """
        with self._bound(pid, name, file, mounts.MS_RDONLY):
            yield

    @contextmanager
    def _bound(self, pid: int, name: str, file: Path, flags: int) -> Iterator[None]:
        """A jailed process has mounts of its own, whose root is the jail's; one without a jailer has ours."""
        target = str(self.root / name) if mount_namespace.is_shared_with(pid) else f"/{name}"
        (self.root / name).touch()
        try:
            mount_namespace.bind_into(pid, str(file), target, flags)
            yield
        finally:
            mount_namespace.unmount_in(pid, target)
            (self.root / name).unlink()

    def _bind(self, source: str, name: str, *, is_for_root: bool) -> None:
        if not is_for_root and not Path(source).stat().st_mode & stat.S_IROTH:
            raise UsageError(
                f"{source} cannot be read by the user that a jailed VM runs as",
                hint=f"chmod o+r {source}; the directories that lead there do not matter",
            )
        target = self.root / name
        target.touch()
        mounts.mount(source, str(target), flags=mounts.MS_BIND | mounts.MS_RDONLY)


def _free_uid() -> int:
    """Return a user that owns no jail of this host; the jail that is made next has it, before anybody else looks."""
    roots = Path(paths.sandboxes_dir()).glob("*/vm/jail/*/*/root")
    taken = {root.stat().st_uid for root in roots}
    return next(uid for uid in range(_FIRST_UID, _FIRST_UID + len(taken) + 1) if uid not in taken)


def _device(spec: BlockSpec, undo: ExitStack) -> int:
    """Return the number of a block device with the source's bytes; a loop device lives as long as it is open."""
    node = spec.source
    if not is_block_device(spec.source):
        node = undo.enter_context(loop.device(spec.source, is_read_only=spec.is_read_only))
    return Path(node).stat().st_rdev


def _sectors(device: int) -> int:
    """Return a block device's size (Documentation/ABI/stable/sysfs-block of Linux)."""
    return int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size").read_text())
