"""Writing a VM into a directory, and going on from there in another Cloud Hypervisor.

Cloud Hypervisor writes three files: ``config.json``, the body of ``vm.create``; ``state.json``; and ``memory-ranges``,
the guest's memory. All that names a place in the first is relative to the VM's directory, but the rules of Landlock,
which name that directory. So a VM is restored from a directory of its own, ``restored``, with a changed configuration
and links to the other two. They are opened before the rules hold; with memory on demand ``memory-ranges`` stays open.

Source: ``Vmm::vm_snapshot``, ``Vmm::vm_restore`` in vmm/src/lib.rs and ``RestoreConfig`` in vmm/src/config.rs of v51.1,
v52.0 and v53.0.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UnsupportedError
from common.services.vmm import MemoryMode

if TYPE_CHECKING:
    from procs.vmm_manager.drivers import Restoring
    from procs.vmm_manager.drivers.cloud_hypervisor.api import Api
    from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement
    from procs.vmm_manager.drivers.cloud_hypervisor.versions import Features

TIMEOUT_S = 120.0
"""How long writing or reading a guest's memory may take; Cloud Hypervisor answers nothing else meanwhile."""
_CONFIG, _LINKED = "config.json", ("state.json", "memory-ranges")
_RESTORED = "restored"
_DESTINATION = "snapshot"
_MODES = {MemoryMode.COPY: "Copy", MemoryMode.ON_DEMAND: "OnDemand"}


async def write(api: Api, confinement: Confinement, directory: str) -> None:
    """Have a paused VM written into an empty directory.

    Raises:
        KataError, OSError: it was not, or it is not known whether it was.
    """
    with confinement.shown_directory(_DESTINATION, directory) as path:
        await api.put("vm.snapshot", {"destination_url": f"file://{path}"}, timeout_s=TIMEOUT_S)


def require(restoring: Restoring, version: str, features: Features) -> None:
    """Refuse what this version cannot do.

    Raises:
        UnsupportedError: another version wrote the snapshot, or this one knows no memory on demand.
    """
    if restoring.snapshot.version != version:
        raise UnsupportedError(
            f"Cloud Hypervisor {version} cannot read a snapshot of {restoring.snapshot.version}",
            hint="take one with this version",
        )
    if restoring.memory is MemoryMode.ON_DEMAND and not features.has_memory_on_demand:
        raise UnsupportedError(
            f"Cloud Hypervisor {version} cannot give a guest its memory on demand, which 52 and later can",
            hint="restore with memory `copy`",
        )


async def restore(restoring: Restoring, api: Api, confinement: Confinement, directory: str) -> None:
    """Have a VM go on from a snapshot.

    Args:
        restoring: which, and how.
        api: of a Cloud Hypervisor without a VM.
        confinement: of the new VM.
        directory: the new VM's.

    Raises:
        KataError, OSError: it does not.
    """
    own = await asyncio.to_thread(_prepare, restoring.snapshot.directory, confinement, directory)
    on_demand = {"memory_restore_mode": _MODES[restoring.memory]} if restoring.memory is MemoryMode.ON_DEMAND else {}
    await api.put("vm.restore", {"source_url": f"file://{own}", **on_demand}, timeout_s=TIMEOUT_S)
    await api.put("vm.resume")


def _prepare(snapshot: str, confinement: Confinement, directory: str) -> Path:
    own = Path(directory) / _RESTORED
    own.mkdir(mode=0o700)
    config = json.loads((Path(snapshot) / _CONFIG).read_bytes())
    unconfined = {key: value for key, value in config.items() if not key.startswith("landlock_")}
    (own / _CONFIG).write_text(json.dumps({**unconfined, **confinement.parameters()}))
    for name in _LINKED:
        (own / name).symlink_to(Path(snapshot) / name)
    return own
