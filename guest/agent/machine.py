"""What upstream's shim tells the guest as a machine: time, entropy, processors and memory that were plugged.

Our shim asks none of this: the guest has the hypervisor's clock and generator, and nothing is plugged offline.
"""

from __future__ import annotations

import fcntl
import posix
import struct
import time

from common import status
from common.protocols.agent import Empty
from guest.agent.files import read_text, write_text
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from common.protocols.guest import (
        MemHotplugByProbeRequest,
        OnlineCPUMemRequest,
        ReseedRandomDevRequest,
        SetGuestDateTimeRequest,
    )
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call

MEMORY_PROBE = "/sys/devices/system/memory/probe"

_PROCESSORS = "/sys/devices/system/cpu"
_MEMORY = "/sys/devices/system/memory"
_PLUG_TIMEOUT_S = 5.0
"""How long plugged processors may take to be there; upstream's agent waits for a second."""

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
"""Of linux/random.h: add bytes and how many bits they are worth; use them from now on."""
_PIECE = 512


def set_date_time(request: SetGuestDateTimeRequest, _call: Call) -> Empty:
    """Set the clock."""
    if request.sec < 0 or not 0 <= request.usec < 1_000_000:
        raise RpcError(status.INVALID_ARGUMENT, f"{request.sec} s and {request.usec} us are no time")
    time.clock_settime_ns(time.CLOCK_REALTIME, request.sec * 1_000_000_000 + request.usec * 1000)
    return Empty()


def reseed(request: ReseedRandomDevRequest, _call: Call) -> Empty:
    """Add entropy to the kernel's generator."""
    if not request.data:
        raise RpcError(status.INVALID_ARGUMENT, "no entropy")
    device = posix.open("/dev/random", posix.O_RDWR | posix.O_CLOEXEC)
    try:
        for at in range(0, len(request.data), _PIECE):
            piece = request.data[at : at + _PIECE]
            fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(piece) * 8, len(piece)) + piece)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
    finally:
        posix.close(device)
    return Empty()


def probe_memory(request: MemHotplugByProbeRequest, _call: Call) -> Empty:
    """Tell the kernel of memory at these addresses."""
    for address in request.addresses:
        try:
            write_text(MEMORY_PROBE, f"{address:#x}")
        except OSError as err:
            raise RpcError(status.FAILED_PRECONDITION, f"no memory at {address:#x}: {err.strerror}") from err
    return Empty()


class Plugging:
    """Brings online what was plugged."""

    def __init__(self, reactor: Reactor, uevents: Uevents) -> None:
        self._reactor = reactor
        self._uevents = uevents

    def online(self, request: OnlineCPUMemRequest, call: Call) -> None:
        """Answer when so many processors have come online, and the memory that is there."""
        count = 0

        def attempt() -> None:
            nonlocal count
            count += _bring_online(_PROCESSORS, "cpu", "online", "0", "1")
            if count >= request.nb_cpus:
                finish("")

        def finish(error: str) -> None:
            timer.cancel()
            self._uevents.unlisten(attempt)
            if error:
                call.fail(status.FAILED_PRECONDITION, error)
                return
            if not request.cpu_only:
                _bring_online(_MEMORY, "memory", "state", "offline", "online")
            call.reply(Empty())

        def expire() -> None:
            finish(f"{count} of {request.nb_cpus} processors came online within {_PLUG_TIMEOUT_S:.0f} s")

        timer = self._reactor.later(_PLUG_TIMEOUT_S, expire)
        self._uevents.listen(attempt)
        attempt()


def _bring_online(directory: str, prefix: str, file: str, is_off: str, turn_on: str) -> int:
    """Write to the file of every unit that is off; return how many those were."""
    count = 0
    for name in posix.listdir(directory):
        path = f"{directory}/{name}/{file}"
        if name.startswith(prefix) and name[len(prefix) :].isdigit() and read_text(path).strip() == is_off:
            write_text(path, turn_on)
            count += 1
    return count
