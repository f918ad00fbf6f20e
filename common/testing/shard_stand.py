"""A device manager of several shards under test: real processes, a real VM manager, fake QEMUs.

::

    async with sharding(2) as stand:
        devices = await stand.sandbox(shard=1)
        stand.shards[0].kill()
        await devices.attach(spec=disk("a"))
"""

from __future__ import annotations

import itertools
import os
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from common import shards
from common.bus.client import BusClient
from common.testing.device_stand import DeviceManager
from common.testing.hotplug_stand import fake_vm
from common.testing.isolation import run_dir, variable
from common.testing.vmm_stand import managing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.testing.vmm_stand import Manager


class ShardStand:
    """The services of a host.

    Attributes:
        manager: the VM manager.
        shards: the processes of the device manager.
    """

    def __init__(self, bus: BusClient, manager: Manager, stack: AsyncExitStack) -> None:
        self.manager = manager
        self.shards: list[DeviceManager] = []
        self._bus = bus
        self._stack = stack

    async def start(self, count: int) -> None:
        """Start so many shards, and have the VM manager spread new sandboxes over them."""
        os.environ[shards.VARIABLE] = str(count)
        self.manager.kill()
        await self.manager.start()
        self.shards = [DeviceManager(self._bus, "", (), shard=number, shards_of=count) for number in range(count)]
        for shard in self.shards:
            await shard.start()

    def kill(self) -> None:
        """Kill every shard."""
        for shard in self.shards:
            shard.kill()
        self.shards.clear()

    async def sandbox(self, *, shard: int) -> DeviceManager:
        """Make a sandbox that a shard gets; return who calls that shard on its behalf."""
        names = (f"h{uuid.uuid4().hex[:8]}" for _ in itertools.count())
        sandbox_id = next(name for name in names if shards.of(name) == shards.service_name(shard))
        vm, _ = await self._stack.enter_async_context(fake_vm(self.manager, sandbox_id))
        assert vm.device_manager == shards.service_name(shard)
        return DeviceManager(self._bus, sandbox_id, vm.hotplug_buses, shard=shard)


@asynccontextmanager
async def sharding(count: int) -> AsyncIterator[ShardStand]:
    """Provide a device manager of so many shards, and end all that was begun."""
    with run_dir(), variable(shards.VARIABLE, str(count)):
        async with BusClient() as bus, managing() as manager, AsyncExitStack() as stack:
            stand = ShardStand(bus, manager, stack)
            try:
                await stand.start(count)
                yield stand
            finally:
                stand.kill()
