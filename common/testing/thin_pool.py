"""A thin pool of device-mapper on loop devices, as containerd's devmapper snapshotter stands on one, and disks of it.

::

    with ThinPool(directory, "16M", content) as pool:
        node = pool.snapshot("disk")        # /dev/mapper/<pool>-disk, with the content as ext4
        pool.remove("disk")                 # refused while anybody has it open

The kernel needs ``dm_thin_pool``. Source of the tables and messages: Linux, Documentation/admin-guide/device-mapper/
thin-provisioning.rst.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from common.linux import loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECTOR = 512
_METADATA_SIZE, _DATA_SIZE = 16 << 20, 1 << 30
"""Of files that take only what is written to them."""
_BLOCK_SECTORS, _LOW_WATER_BLOCKS = 128, 0
_ORIGIN = 0


class ThinPool:
    """A pool and its disks; a context manager, which removes what is left of them.

    Attributes:
        name: the pool's.
    """

    def __init__(self, directory: Path, size: str, content: Path) -> None:
        """Prepare it.

        Args:
            directory: where its files are.
            size: of each disk, as mkfs.ext4 takes it.
            content: what is on each disk, with ext4, before it is written.
        """
        self.name = f"kt-{os.getpid()}"
        self._directory = directory
        self._size = size
        self._content = content
        self._ids: dict[str, int] = {}
        self._last_id = _ORIGIN
        self._sectors = 0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(empty_pool(self._directory, self.name))
            image = self._directory / "origin"
            command = ["/sbin/mkfs.ext4", "-q", "-F", "-d", str(self._content), str(image), self._size]
            subprocess.run(command, check=True)
            self._sectors = image.stat().st_size // _SECTOR
            self._message(f"create_thin {_ORIGIN}")
            self._activate("origin", _ORIGIN)
            undo.callback(dmsetup, "remove", "--retry", f"{self.name}-origin")
            subprocess.run(
                ["/bin/dd", f"if={image}", f"of={self._node('origin')}", "bs=1M", "conv=sparse,fsync", "status=none"],
                check=True,
            )
            self._exit = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._exit:
            for name in tuple(self._ids):
                self.remove(name)

    def snapshot(self, name: str) -> str:
        """Make a disk with the content; return its node."""
        self._last_id += 1
        dmsetup("suspend", f"{self.name}-origin")
        try:
            self._message(f"create_snap {self._last_id} {_ORIGIN}")
        finally:
            dmsetup("resume", f"{self.name}-origin")
        self._ids[name] = self._last_id
        self._activate(name, self._last_id)
        return self._node(name)

    def remove(self, name: str) -> None:
        """Remove a disk, as containerd does with a snapshot.

        Raises:
            SubprocessError: somebody has it open.
        """
        dmsetup("remove", f"{self.name}-{name}")
        self._message(f"delete {self._ids.pop(name)}")

    def disks(self) -> list[str]:
        """Return the disks that there are, as device-mapper has it."""
        listed = dmsetup("ls").splitlines()
        names = [line.split()[0].removeprefix(f"{self.name}-") for line in listed if line.startswith(f"{self.name}-")]
        return sorted(set(names) - {"origin"})

    def _message(self, text: str) -> None:
        dmsetup("message", self.name, "0", text)

    def _activate(self, name: str, thin_id: int) -> None:
        dmsetup("create", f"{self.name}-{name}", "--table", f"0 {self._sectors} thin /dev/mapper/{self.name} {thin_id}")

    def _node(self, name: str) -> str:
        return f"/dev/mapper/{self.name}-{name}"


@contextmanager
def empty_pool(directory: Path, name: str) -> Iterator[None]:
    """A pool without disks, for the ``with``."""
    with ExitStack() as stack:
        nodes = []
        for kind, size in (("metadata", _METADATA_SIZE), ("data", _DATA_SIZE)):
            file = directory / f"{name}-{kind}"
            file.touch()
            os.truncate(file, size)
            nodes.append(stack.enter_context(loop.device(str(file), is_read_only=False)))
        options = f"{_BLOCK_SECTORS} {_LOW_WATER_BLOCKS} 1 skip_block_zeroing"
        dmsetup("create", name, "--table", f"0 {_DATA_SIZE // _SECTOR} thin-pool {' '.join(nodes)} {options}")
        stack.callback(dmsetup, "remove", "--retry", name)
        yield


def dmsetup(*arguments: str) -> str:
    """Run dmsetup; return what it printed.

    Raises:
        SubprocessError: the kernel refused.
    """
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}  # there may be none, and nodes are then its own to make
    result = subprocess.run(["/sbin/dmsetup", *arguments], capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise subprocess.SubprocessError(f"dmsetup {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout
