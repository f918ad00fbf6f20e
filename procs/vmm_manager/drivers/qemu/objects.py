"""QEMU's user-created objects, by QMP: memory backends, in our case. Source: qapi/qom.json of QEMU 7.2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from procs.vmm_manager.drivers.qemu.qmp import Qmp

_OBJECTS = "/objects"


async def add(qmp: Qmp, kind: str, name: str, **properties: object) -> None:
    """Make an object.

    Raises:
        HypervisorError: QEMU refused.
    """
    await qmp.execute("object-add", **{"qom-type": kind, "id": name}, **properties)


async def remove(qmp: Qmp, name: str) -> None:
    """Unmake an object.

    Raises:
        HypervisorError: QEMU refused; something uses it.
    """
    await qmp.execute("object-del", id=name)


async def listed(qmp: Qmp, prefix: str) -> set[str]:
    """Return the objects whose names begin with a prefix."""
    found = await qmp.execute("qom-list", path=_OBJECTS)
    return {name for name in (str(item["name"]) for item in found) if name.startswith(prefix)}
