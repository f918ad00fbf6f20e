"""What a Cloud Hypervisor may open of the host, and how a file that comes later is shown to it.

Landlock, where the kernel has it: from ``vm.create`` on Cloud Hypervisor's own thread, and all that it starts after
that, open nothing but what the rules name (docs/adr/0030-files-are-shown-to-a-confined-vmm.md):

=================  ============  =======================================================================================
rule               access        for
=================  ============  =======================================================================================
the VM's files     as is needed  kernel, initrd, random numbers: Cloud Hypervisor names them itself
the VM's directory read, write   its sockets, and files that come later
``/dev/vfio``      read, write   devices of the host, if this host can lend any
``/sys``           read          the same
=================  ============  =======================================================================================

Rules cannot be added later. So a disk's file, wherever it is, is bound to a name in the VM's directory while Cloud
Hypervisor opens it, and goes from there at once: what is open stays open. Landlock looks at where a file is found, and
there it is found below the directory.

Not confined are the threads that take requests and write events, which ``vm.create`` comes too late for.

Source: ``vmm/src/landlock.rs`` and ``VmConfig::apply_landlock`` in vmm/src/vm_config.rs of v51.1 and v53.0;
landlock(7).
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.linux import landlock, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.config import ClhConfig

_LEAST_ABI = 3
"""What Cloud Hypervisor insists on (Linux 6.2)."""
_VFIO = "/dev/vfio"


class Confinement:
    """The one of one VM.

    Args:
        config: whether it is wanted.
        directory: the VM's.

    Attributes:
        is_on: whether there is one. Configuration and kernel say so, which an adopted VM was started with too.
    """

    def __init__(self, config: ClhConfig, directory: str) -> None:
        self._directory = Path(directory)
        self.is_on = not config.disable_landlock and landlock.abi() >= _LEAST_ABI

    def parameters(self) -> dict[str, Any]:
        """Return the part of ``vm.create`` about it."""
        if not self.is_on:
            return {}
        rules = [{"path": str(self._directory), "access": "rw"}]
        if Path(_VFIO).exists():
            rules += [{"path": _VFIO, "access": "rw"}, {"path": "/sys", "access": "r"}]
        return {"landlock_enable": True, "landlock_rules": rules}

    @contextmanager
    def shown(self, name: str, source: str) -> Iterator[str]:
        """A file or block device for as long as it takes Cloud Hypervisor to open it, by the path that is yielded.

        Args:
            name: of the device; nothing else in the VM's directory is called so.
            source: where it is on the host.

        Raises:
            OSError: there is no such file, or it cannot be bound.
        """
        if not self.is_on:
            yield source
            return
        # What it is bound to is a socket, so that nothing can be opened if the request is carried out late.
        os.mknod(self._directory / name, stat.S_IFSOCK | 0o600)
        try:
            mounts.mount(source, str(self._directory / name), flags=mounts.MS_BIND)
            yield name
        finally:
            self.hide(name)

    @contextmanager
    def shown_directory(self, name: str, source: str) -> Iterator[str]:
        """A directory, in the same way; it is yielded with its absolute path.

        Raises:
            OSError: it cannot be bound.
        """
        if not self.is_on:
            yield source
            return
        target = self._directory / name
        target.mkdir(mode=0o700, exist_ok=True)
        try:
            mounts.mount(source, str(target), flags=mounts.MS_BIND)
            yield str(target)
        finally:
            mounts.unmount(str(target))
            target.rmdir()

    def hide(self, name: str) -> None:
        """Take back what is shown under a name, also what a manager that died has left; nothing is fine."""
        mounts.unmount(str(self._directory / name))
        (self._directory / name).unlink(missing_ok=True)

    def path(self, name: str, source: str) -> str:
        """Return what Cloud Hypervisor was told a file is called."""
        return name if self.is_on else source

    def said(self, name: str, source: str) -> str:
        """Return what a failure's message should add to Cloud Hypervisor's own words, which have its path."""
        return f" ({name} is {source})" if self.is_on else ""
