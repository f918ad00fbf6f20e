"""Calls that our shim does not make and upstream's does. Imported when the first of them comes."""

from __future__ import annotations

from common.protocols import agent, guest
from guest.agent import copying, machine, metrics, network, volumes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Methods


def methods(reactor: Reactor, uevents: Uevents) -> Methods:
    """Return the verbs by name."""
    plugging = machine.Plugging(reactor, uevents)
    return {
        "SetGuestDateTime": (guest.SetGuestDateTimeRequest, machine.set_date_time),
        "ReseedRandomDev": (guest.ReseedRandomDevRequest, machine.reseed),
        "OnlineCPUMem": (guest.OnlineCPUMemRequest, plugging.online),
        "MemHotplugByProbe": (guest.MemHotplugByProbeRequest, machine.probe_memory),
        "CopyFile": (guest.CopyFileRequest, copying.copy_file),
        "GetMetrics": (agent.Empty, metrics.get_metrics),
        "GetVolumeStats": (guest.VolumeStatsRequest, volumes.get_stats),
        "UpdateEphemeralMounts": (guest.UpdateEphemeralMountsRequest, volumes.update_ephemeral),
        **network.Network(reactor, uevents).methods(),
    }
