"""The host's interfaces that VMs get as network devices: opened here, in the sandbox's namespace, which no VMM enters.

A VMM is handed the descriptor. It has the interface as long as it has that open; a tap that was made for it goes then.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from common.errors import NotFoundError, UsageError
from common.linux import netns
from common.services.vmm import InterfaceKind, NetworkSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_OPEN: dict[InterfaceKind, Callable[[str, str], int]] = {
    InterfaceKind.TAP: netns.open_tap,
    InterfaceKind.MACVTAP: netns.open_macvtap,
}


@asynccontextmanager
async def opened(spec: NetworkSpec) -> AsyncIterator[int]:
    """Open an interface, and make a tap that is not there; it is closed on our side at the end.

    Raises:
        NotFoundError: there is no such namespace.
        UsageError: there is no such interface, it is not of that kind, or in use.
    """
    try:
        fd = await asyncio.to_thread(_OPEN[spec.type], spec.namespace, spec.interface)
    except FileNotFoundError as err:
        raise NotFoundError(f"network namespace {spec.namespace} does not exist") from err
    except OSError as err:
        raise UsageError(
            f"{spec.interface} in {spec.namespace} cannot be opened as a {spec.type}: {err.strerror or err}",
            hint="`ip -d link` in that namespace shows what it is, and who has it",
        ) from err
    try:
        yield fd
    finally:
        os.close(fd)
