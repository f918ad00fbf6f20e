"""Which process of the device manager has a sandbox.

The device manager may run as several processes, *shards*: ``$KATA_DEVICE_MANAGER_SHARDS`` of them, one if it is not
set. A sandbox gets its shard when its VM is made, by its id, and keeps it for life: the shard's bus name stands in the
VM's record and goes wherever the VM is described (:class:`common.services.vmm.Vm`). So a changed number is a matter of
new sandboxes only. Shard 0 exists whatever the number is and has the bus name of the one process.
"""

from __future__ import annotations

import os
import re
import zlib

from common import paths
from common.errors import UsageError

VARIABLE = "KATA_DEVICE_MANAGER_SHARDS"
FIRST = "device"
"""Bus name of shard 0."""
MAX_SHARDS = 64

_LOCK = re.compile(rf"({FIRST}(?:\.\d+)?)\.lock")


def count() -> int:
    """Return how many shards new sandboxes are spread over.

    Raises:
        UsageError: the variable is no number from 1 to 64.
    """
    value = os.environ.get(VARIABLE) or "1"
    if not re.fullmatch(r"[0-9]{1,2}", value) or not 1 <= int(value) <= MAX_SHARDS:
        raise UsageError(f"{VARIABLE} is {value!r}", hint=f"set it to a number from 1 to {MAX_SHARDS}")
    return int(value)


def service_name(shard: int) -> str:
    """Return a shard's bus name: ``device`` or, from the second one on, ``device.<n>``."""
    return f"{FIRST}.{shard}" if shard else FIRST


def of(sandbox_id: str) -> str:
    """Return the bus name of the shard that a new sandbox gets; ids are spread by their CRC-32."""
    return service_name(zlib.crc32(sandbox_id.encode()) % count())


def services() -> list[str]:
    """Return the bus names of the shards that there have been since the host's boot, or of the first if none."""
    try:
        names = os.listdir(paths.bus_dir())  # noqa: PTH208 - the same without objects
    except FileNotFoundError:
        names = []
    return [lock[1] for lock in map(_LOCK.fullmatch, sorted(names)) if lock] or [FIRST]
