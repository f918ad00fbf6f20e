"""Which version of Cloud Hypervisor can do what, as data.

Source: its release notes, and its code at v51.1, v52.0 and v53.0.
"""

from __future__ import annotations

from typing import NamedTuple

from common.errors import UnsupportedError

MINIMUM = (51, 0)
"""``image_type`` (v51): without it a raw image's first sector is silently not written."""


class Features(NamedTuple):
    """What differs between the versions that are used.

    Attributes:
        is_slot_ours: ``pci_device_id`` puts a device into the slot of our choice (v52). Before, the lowest free one is
            taken, and a slot of ours is only counted.
        is_second_removal_harmless: a device's removal may be asked for while it is pending (v53). Before, Cloud
            Hypervisor panics if the device is a network device, and may have what comes next in its slot ejected.
        has_memory_on_demand: a restored guest can get its memory page by page (v52).
    """

    is_slot_ours: bool
    is_second_removal_harmless: bool
    has_memory_on_demand: bool


_SINCE = {"is_slot_ours": (52, 0), "is_second_removal_harmless": (53, 0), "has_memory_on_demand": (52, 0)}


def features_of(version: str) -> Features:
    """Return what a version can do.

    Args:
        version: as ``vmm.ping`` tells it, for example ``53.0.0``.

    Raises:
        UnsupportedError: it is too old, or no version.
    """
    numbers = parsed(version)
    if numbers < MINIMUM:
        raise UnsupportedError(
            f"Cloud Hypervisor {version} is too old",
            hint=f"at least {'.'.join(map(str, MINIMUM))} is needed; see hypervisor.clh.path",
        )
    return Features(**{name: numbers >= since for name, since in _SINCE.items()})


def parsed(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version, for comparisons."""
    numbers = []
    for part in version.lstrip("v").split("-")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
