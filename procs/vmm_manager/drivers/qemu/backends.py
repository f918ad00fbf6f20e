"""What is special about each kind of device of QEMU: what it stands on, on the host's side.

A share stands on a virtiofsd and a chardev that leads to it, a disk on a block node, memory on a memory backend. What
is the same for all kinds is in ``devices``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from procs.vmm_manager.record import DeviceRecord


class Backend(ABC):
    """One kind; a device's id is also the name of what it stands on.

    Attributes:
        prefix: what the ids of its devices begin with.
        kept: why its devices cannot be removed; empty if they can.
    """

    prefix: str
    kept: str = ""

    @abstractmethod
    async def make(self, device_id: str, device: DeviceRecord) -> Mapping[str, object]:
        """Make what a device stands on; return the arguments of its ``device_add``, ``driver`` among them.

        Raises:
            KataError: it cannot be; what was made of it is left to :meth:`unmake`.
        """

    @abstractmethod
    async def unmake(self, device_id: str) -> None:
        """Undo :meth:`make`, however far it came.

        Raises:
            KataError: something of it is still there.
        """

    @abstractmethod
    async def made(self) -> Collection[str]:
        """Return the ids of the devices whose backends QEMU has."""

    def said(self, _device_id: str) -> str:
        """Return what a failure's message should add to QEMU's own words."""
        return ""

    def adopt(self, _device_id: str) -> None:  # noqa: B027 - most kinds have nothing outside QEMU
        """Go on with a backend that an earlier manager made."""
