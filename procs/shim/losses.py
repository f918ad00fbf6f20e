"""Devices that vanish while containers use them.

The device manager publishes ``device-lost`` and counts it. The shim writes it to its log, where containerd's operator
looks, with the containers that used the device. Nothing is done about it: the guest's kernel answers I/O on a disk that
is not there with an error, and the container has to see that.

Whoever may have missed an event asks: what was confirmed and is no more listed was lost meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import log
from common.bus.events import Resync, Subscriber
from common.errors import KataError
from common.services import device

if TYPE_CHECKING:
    from procs.shim.devices import Devices
    from procs.shim.sandbox import Sandbox

_ASK_TIMEOUT_S = 5.0


async def tell_losses(sandbox: Sandbox) -> None:
    """Write to the log which devices of a sandbox are lost, as long as its VM lives."""
    try:
        devices = (await sandbox.wait_booted()).devices
    except KataError:
        return  # there is no guest that could lose anything
    async with Subscriber({devices.service: sandbox.sandbox_id}) as news:
        async for item in news:
            try:
                if isinstance(item, Resync):
                    present = await devices.listed(timeout_s=_ASK_TIMEOUT_S)
                    _tell(sandbox, devices, [used for used in devices.in_use.values() if used.device_id not in present])
                elif (lost := item.body_of(device.DEVICE_LOST)) is not None and lost.device_id in devices.in_use:
                    _tell(sandbox, devices, [lost])
            except KataError as err:
                log.get().warning("it is not known whether devices are lost", error=str(err))


def _tell(sandbox: Sandbox, devices: Devices, lost: list[device.Device]) -> None:
    for gone in [] if sandbox.is_gone.is_set() else lost:  # the end of a VM is no loss
        devices.in_use.pop(gone.device_id, None)
        source = gone.spec.source if gone.spec else ""
        holders = [holder.name for holder in gone.holders]
        log.get().error("device lost: I/O on it fails", device=gone.device_id, source=source, containers=holders)
