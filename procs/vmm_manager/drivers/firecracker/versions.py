"""What each version of Firecracker can do, as far as it matters here. Pure.

Source: CHANGELOG.md of Firecracker; the source of 1.12.1, 1.15.1 and 1.16.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import UnsupportedError

Version = tuple[int, ...]

MINIMUM: Version = (1, 12)
"""The version that upstream pins (Kata Containers 4.1.0), and the oldest that was looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a version can do.

    Attributes:
        version: which, for example ``1.16.1``.
        has_pci_hotplug: whether drives can be added to and removed from a running VM (``--enable-pci``).
    """

    version: str
    has_pci_hotplug: bool


_SINCE: dict[str, Version] = {"has_pci_hotplug": (1, 16)}
"""The first version of each feature."""


def features(version: str) -> Features:
    """Return what a version can do.

    Args:
        version: as Firecracker itself says it, for example ``1.16.1`` or ``1.17.0-dev``.

    Raises:
        UnsupportedError: it is older than what this driver was made for, or no version.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < MINIMUM:
        raise UnsupportedError(
            f"Firecracker {version or 'of unknown version'} is not supported",
            hint=f"install {'.'.join(map(str, MINIMUM))} or later, or name it in hypervisor.firecracker.path",
        )
    return Features(version=version, **{name: numbers >= since for name, since in _SINCE.items()})


def printed(text: str) -> str:
    """Return the version in what ``firecracker --version`` prints, or nothing."""
    found = re.search(r"^Firecracker v(\S+)", text, re.MULTILINE)
    return found[1] if found else ""
