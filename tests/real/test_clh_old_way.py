"""Why the answer to a removal is not the removal: what a real Cloud Hypervisor does to who believes it.

So did the runtime of docs/hotplug.md: remove the device, take 204 for gone, start again on the same snapshot.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from common import paths
from common.testing.clh_api import ClhApi
from common.testing.hotplug_stand import plugging_into
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import RealCloudHypervisor

if TYPE_CHECKING:
    from common.testing.thin_pool import ThinPool

_ROUNDS = 20


class OldWay:
    """A client that takes each answer for the fact."""

    def __init__(self, directory: str) -> None:
        self._api = ClhApi(directory)

    def add(self, node: str) -> str:
        """Add a disk; return why it was refused, or nothing."""
        return self._api.put("vm.add-disk", path=node, image_type="Raw")

    def remove_all(self) -> None:
        """Ask for the removal of every disk."""
        for disk in self._disks():
            self._api.put("vm.remove-device", id=disk)

    def has(self) -> bool:
        """Return whether there is a disk."""
        return bool(self._disks())

    def _disks(self) -> list[str]:
        info: dict[str, Any] = self._api.get("vm.info")
        return [name for name in info["device_tree"] if name.startswith("_disk")]


@in_event_loop
async def test_a_disk_that_is_wanted_again_at_once_is_locked(pool: ThinPool) -> None:
    async with plugging_into(RealCloudHypervisor) as stand:
        clh = OldWay(paths.vm_dir(stand.sandbox_id))
        node = await asyncio.to_thread(pool.snapshot, "root")
        refusals = []
        for _ in range(_ROUNDS):
            assert await asyncio.to_thread(clh.add, node) == ""
            await asyncio.to_thread(clh.remove_all)
            refusals.append(await asyncio.to_thread(clh.add, node))
            while await asyncio.to_thread(clh.has):  # what it does not wait for
                await asyncio.to_thread(clh.remove_all)
                await asyncio.sleep(0.1)
        assert all("locked" in refusal for refusal in refusals), refusals
