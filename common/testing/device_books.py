"""The device manager's journal and claims, in memory, for tests of what it does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.services.device import Chapter, Device


class Rows:
    """A journal in memory, which outlives the manager.

    Attributes:
        rows: each device by its id.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Device] = {}

    def load(self) -> list[Device]:
        """Return all rows, the oldest first."""
        return sorted(self.rows.values(), key=lambda device: device.device_id)

    def save(self, device: Device, _: Chapter) -> None:
        """Enter a device as it is now."""
        self.rows[device.device_id] = device

    def remove(self, device: Device, _: Chapter) -> None:
        """Take a device out."""
        del self.rows[device.device_id]


class Claims:
    """The host's claims in memory; there is one sandbox, so nothing is in the way of any.

    Attributes:
        claimed: the sandbox of each device that has claims, by the device's id.
    """

    def __init__(self) -> None:
        self.claimed: dict[str, str] = {}

    def take(self, device: Device) -> None:
        """Claim what a device stands on."""
        self.claimed[device.device_id] = device.sandbox_id

    def restore(self, devices: Iterable[Device]) -> None:
        """Claim what devices of before stand on."""
        self.claimed.update((device.device_id, device.sandbox_id) for device in devices)

    def drop(self, device_id: str) -> None:
        """Give back what a device stood on."""
        self.claimed.pop(device_id, None)

    def sandboxes(self, _: str) -> set[str]:
        """Return whose claims there are."""
        return set(self.claimed.values())

    def drop_strays(self, _: str, known: Iterable[Device]) -> None:
        """Give back what no known device stands on."""
        kept = {device.device_id for device in known}
        self.claimed = {device_id: sandbox for device_id, sandbox in self.claimed.items() if device_id in kept}
