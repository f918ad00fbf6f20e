"""QEMU's ways to Unix sockets on which programs serve devices by vhost-user. Source: qapi/char.json of QEMU 7.2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from procs.vmm_manager.drivers.qemu.qmp import Qmp


async def connect(qmp: Qmp, name: str, path: str) -> None:
    """Have QEMU connect to a socket.

    Args:
        qmp: of the VM.
        name: the chardev's.
        path: relative to QEMU's working directory, or absolute.

    Raises:
        HypervisorError: nobody listens there.
    """
    address = {"type": "unix", "data": {"path": path}}
    await qmp.execute("chardev-add", id=name, backend={"type": "socket", "data": {"addr": address, "server": False}})


async def close(qmp: Qmp, name: str) -> None:
    """Have QEMU close a connection.

    Raises:
        HypervisorError: a device uses it.
    """
    await qmp.execute("chardev-remove", id=name)


async def listed(qmp: Qmp, prefix: str) -> set[str]:
    """Return the chardevs whose names begin with a prefix."""
    found = await qmp.execute("query-chardev")
    return {label for label in (str(item["label"]) for item in found) if label.startswith(prefix)}
