"""Writing a VM into a directory, and going on from there in another Firecracker.

Firecracker writes two files, the state and the guest's memory, as its jail's user; so both are made for it, bound into
the jail, and taken back. All that names a place in the state is relative to the jail's root, and there again in the
next jail. Several VMs may go on from one snapshot, each as a user of its own: so who can look into the directory can
read the files, and that is its owner alone.

Memory comes on demand and in no other way: the file is mapped (MAP_PRIVATE), pages that nobody has changed are the same
for all VMs that went on from it, and it has to stay as it is as long as they run.

Source: docs/snapshotting/snapshot-support.md and src/vmm/src/persist.rs of Firecracker.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from procs.vmm_manager.drivers.firecracker.api import Api
    from procs.vmm_manager.drivers.firecracker.jail import Jail

TIMEOUT_S = 120.0
"""How long writing a guest's memory may take; Firecracker answers nothing else meanwhile."""
_STATE, _MEMORY = "state", "memory"


async def write(api: Api, jail: Jail, pid: int, directory: str) -> None:
    """Have a paused VM written into an empty directory.

    Raises:
        KataError, OSError: it was not, or it is not known whether it was.
    """
    async with _all(jail.written(pid, name, Path(directory) / name) for name in (_STATE, _MEMORY)):
        body: dict[str, object] = {"snapshot_type": "Full", "snapshot_path": _STATE, "mem_file_path": _MEMORY}
        await api.put("/snapshot/create", body, timeout_s=TIMEOUT_S)


async def restore(api: Api, jail: Jail, pid: int, directory: str) -> None:
    """Have a VM go on from a snapshot, in a Firecracker that nothing has been asked of.

    Raises:
        KataError, OSError: it does not.
    """
    async with _all(jail.read(pid, name, Path(directory) / name) for name in (_STATE, _MEMORY)):
        memory = {"backend_type": "File", "backend_path": _MEMORY}
        body: dict[str, object] = {"snapshot_path": _STATE, "mem_backend": memory, "resume_vm": True}
        await api.put("/snapshot/load", body, timeout_s=TIMEOUT_S)


@asynccontextmanager
async def _all(contexts: Iterable[AbstractContextManager[None]]) -> AsyncIterator[None]:
    """Be in all of these, which take their time to enter and to leave."""
    undo = ExitStack()
    try:
        for context in contexts:
            await asyncio.to_thread(undo.enter_context, context)
        yield
    finally:
        await asyncio.to_thread(undo.close)
