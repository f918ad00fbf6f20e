"""The shim's own process: serving, from the request for the VM to the exit."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.bus.client import BusClient
from common.linux import mounts
from common.ttrpc.server import TtrpcServer
from procs.shim.cleanup import remove_tree
from procs.shim.events import EventSender
from procs.shim.losses import tell_losses
from procs.shim.sandbox import Sandbox
from procs.shim.service import TaskService

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from common.errors import KataError
    from procs.shim.launch import Launch
    from procs.shim.order import Order


class _ShutDownError(Exception):
    """Ends the task group: everything that still runs in it is cancelled."""


class _LogPipe(io.RawIOBase):
    """The bundle's log FIFO. A line that containerd does not take is dropped: a log must not stop a container."""

    def writable(self) -> bool:
        """Say yes (asked by io)."""
        return True

    def write(self, line: Buffer) -> int:
        """Write a line as a whole, or drop it."""
        with suppress(OSError):
            os.write(2, line)
        return len(memoryview(line))


def serve(launch: Launch, order: Order | KataError, listener_fd: int) -> int:
    """Serve the sandbox until containerd shuts the shim down; return the exit status.

    Args:
        launch: what ``start`` was told.
        order: the VM that was asked for, or why it could not be.
        listener_fd: where containerd connects.
    """
    lines = io.TextIOWrapper(_LogPipe(), write_through=True)  # type: ignore[type-var]  # typeshed wants `name`
    log.configure("shim", stream=lines, is_debug=launch.is_debug)
    with socket.socket(fileno=listener_fd) as listener, log.bound(sandbox=launch.sandbox_id):
        listener.setblocking(False)
        status = 0
        try:
            asyncio.run(_serve(launch, order, listener))
        except* _ShutDownError:
            log.get().info("shim ends")
        except* Exception:  # noqa: BLE001 - the boundary of the process: containerd notices, and calls `delete`
            log.get().exception("shim failed")
            status = 1
    return status


async def _serve(launch: Launch, order: Order | KataError, listener: socket.socket) -> None:
    async with BusClient() as bus, asyncio.TaskGroup() as group:
        sandbox = Sandbox(launch.sandbox_id, order, bus)
        group.create_task(sandbox.boot())
        group.create_task(tell_losses(sandbox))
        sender = EventSender(os.environ.get("TTRPC_ADDRESS", ""), launch.namespace)
        group.create_task(sender.run())
        service = TaskService(sandbox, sender, group)
        group.create_task(service.run())
        server = TtrpcServer(service.methods(), group)
        group.create_task(service.end_when_abandoned(server))
        await server.listen(listener)
        await service.is_shut_down.wait()
        _leave(launch)
        raise _ShutDownError


def _leave(launch: Launch) -> None:
    """Give up the socket and the sandbox's name, before containerd runs `delete` to see that all is gone.

    Raises:
        OSError: something is mounted and would not go; what is below it is the container's owner's, and stays.
    """
    directory = paths.sandbox_dir(launch.sandbox_id)
    mounts.unmount_below(directory)
    Path(launch.socket_path).unlink(missing_ok=True)
    remove_tree(directory)
