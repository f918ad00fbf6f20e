"""What a guest sees of a VM's drives.

On PCI nobody tells it anything: it looks when it is asked to, and a device that was removed behind its back stays for
it, dead, and hides whatever comes into the same slot. Placeholders it has from its start; their files change.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Guest:
    """A guest with PCI.

    Attributes:
        sees: the file behind the device of each slot that the guest knows; None if the device is dead.
    """

    sees: dict[int, str | None] = field(default_factory=dict)

    def rescan(self, slots: dict[int, str]) -> None:
        """Look for devices in slots where it knows of none."""
        for slot, file in slots.items():
            self.sees.setdefault(slot, file)

    def remove(self, slot: int) -> None:
        """Let a device go."""
        self.sees.pop(slot, None)

    def lose(self, slot: int) -> None:
        """Have a device removed behind its back."""
        if slot in self.sees:
            self.sees[slot] = None
