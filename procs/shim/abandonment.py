"""When a shim that holds no container is of no use to anybody.

containerd may die around Create or Delete. One that starts again comes back for containers: it connects to the shim of
every bundle that it finds, and only some versions end one that has nothing (2.x and 1.7 ask for its processes, 1.6 does
not). So a shim without a container ends with the last connection to it. One whose container could not be created is
shut down by the containerd that asked for it, and ends by itself if that died: another has connected meanwhile, and
knows nothing of it. One with a container waits for containerd however long that is away.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.ttrpc.server import TtrpcServer

CONNECT_TIMEOUT_S = 100
"""How long containerd tries to connect to a shim that it has started (1.6 to 2.4, ``runtime/v2/shim.go``)."""

SHUTDOWN_TIMEOUT_S = 10
"""How long containerd may take to shut down a shim whose Create failed; its own limits are 5 s for Delete and 3 s."""


async def wait_abandoned(
    server: TtrpcServer, is_unused: asyncio.Event, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> None:
    """Wait until nobody is connected and there is no container.

    Args:
        server: where containerd connects.
        is_unused: set while there is no container and none is being made.
        connect_timeout_s: how long the first connection may take.
    """
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.has_clients.wait(), connect_timeout_s)
    while not (is_unused.is_set() and server.is_alone.is_set()):
        await is_unused.wait()
        await server.is_alone.wait()
