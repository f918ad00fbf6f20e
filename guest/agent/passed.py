"""PCI devices of the host that the guest has whole and its kernel drives. Imported when there are some.

Each is waited for at its place; whatever the kernel has news of is a reason to look again, and no time is. Then the
modules are loaded that the image has for its class: ``/lib/modules/pci-0200`` lists those for class 02 and subclass 00,
Ethernet. Whether a driver takes it is the kernel's and not waited for, as upstream's agent does not.

The names by which Kubernetes' device plugins tell a container its devices, ``PCIDEVICE_…``, get the guest's addresses,
as upstream's agent has it.

::

    /sys/devices/pci0000:00/0000:00:09.0/0000:02:00.0/class     0x020000

Sources: Documentation/ABI/testing/sysfs-bus-pci of Linux; PCI Code and ID Assignment Specification; the README of the
SR-IOV network device plugin for Kubernetes.
"""

from __future__ import annotations

from common import status
from common.protocols.agent import GUEST_DRIVEN
from guest.agent import modules
from guest.agent.block import pci_device
from guest.agent.files import read_text
from guest.agent.log import log
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from common.protocols import oci
    from common.protocols.agent import Device
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor

_TIMEOUT_S = 10
_CLASS = slice(2, 6)
"""Of ``0x020000``: class and subclass."""
_NAMES = "PCIDEVICE_"


class Passed:
    """A container's devices of the host.

    Args:
        devices: what the host says of its groups.

    Raises:
        RpcError: an option does not say where a device is.
    """

    def __init__(self, devices: list[Device]) -> None:
        self._paths: dict[str, str] = {}
        for option in (option for device in devices for option in device.options):
            address, _, path = option.partition("=")
            if not path:
                raise RpcError(status.INVALID_ARGUMENT, f"{GUEST_DRIVEN}: {option!r} is not <address>=<PCI path>")
            pci_device(path)
            self._paths[address] = path

    def wait(self, reactor: Reactor, uevents: Uevents, done: Callable[[str], None]) -> None:
        """Wait until all are there and their drivers loaded; ``done`` gets an empty text, or what is wrong."""

        def attempt() -> None:
            if self._missing():
                return
            try:
                for path in self._paths.values():
                    modules.load(f"pci-{read_text(f'{pci_device(path)}/class')[_CLASS]}")
            except OSError as err:
                finish(f"a driver for devices of the host cannot be loaded: {err}")
            else:
                log("info", "devices of the host are there", devices=list(self._paths.values()))
                finish("")

        def finish(error: str) -> None:
            timer.cancel()
            uevents.unlisten(attempt)
            done(error)

        def expire() -> None:
            finish(f"no device of the host appeared at {', '.join(self._missing())} within {_TIMEOUT_S} s")

        timer = reactor.later(_TIMEOUT_S, expire)
        uevents.listen(attempt)
        attempt()

    def rename(self, spec: oci.Spec) -> None:
        """Have a container's environment name the devices as the guest does."""
        if spec.process is None:
            return
        here = {address: _address(path) for address, path in self._paths.items()}
        spec.process.env = [_renamed(entry, here) for entry in spec.process.env]

    def _missing(self) -> list[str]:
        return [path for path in self._paths.values() if pci_device(path) is None]


def _address(path: str) -> str:
    return (pci_device(path) or "").rpartition("/")[2]


def _renamed(entry: str, here: dict[str, str]) -> str:
    name, _, value = entry.partition("=")
    if not name.startswith(_NAMES):
        return entry
    return f"{name}={','.join(here.get(address, address) for address in value.split(','))}"
