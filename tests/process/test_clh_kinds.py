"""Devices of Cloud Hypervisor that others serve, on the fake: files that guests map, programs by vhost-user."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import paths
from common.errors import HypervisorError, NotFoundError
from common.services.vmm import PmemSpec, VhostUserDiskSpec
from common.testing.demands import How
from common.testing.hotplug_stand import plugging
from common.testing.isolation import in_event_loop
from common.testing.storage_daemon import serving

pytestmark = pytest.mark.usefixtures("run_dir")


def file(name: str) -> Path:
    path = Path(paths.run_dir()) / name
    path.write_bytes(bytes(2 << 20))
    return path


@in_event_loop
async def test_persistent_memory_comes_and_goes() -> None:
    async with plugging("clh") as stand:
        for _ in range(2):  # the same file again, at once
            memory = await stand.devices.attach(spec=PmemSpec(source=str(file("memory")), is_read_only=True))
            assert memory.hypervisor_id.startswith("_pmem")
            assert (await stand.vmm.has())[0] == {memory.hypervisor_id}
            await stand.devices.detach(await stand.devices.confirm(memory))
            assert await stand.vmm.has() == (set(), set())
        with pytest.raises(NotFoundError, match="/missing does not exist"):
            await stand.manager.plug(stand.sandbox_id, PmemSpec(source="/missing"))


@in_event_loop
async def test_a_disk_that_a_program_serves_comes_and_goes() -> None:
    with serving(file("image")) as socket:
        async with plugging("clh") as stand:
            for _ in range(2):
                disk = await stand.devices.attach(spec=VhostUserDiskSpec(source=str(socket)))
                assert disk.hypervisor_id.startswith("_disk")
                await stand.devices.detach(await stand.devices.confirm(disk))
                assert await stand.vmm.has() == (set(), set())


@in_event_loop
async def test_a_program_that_is_gone_is_refused() -> None:
    with serving(file("image")) as socket:
        pass
    async with plugging("clh") as stand:
        with pytest.raises(HypervisorError, match="Connection to socket failed"):
            await stand.devices.attach(spec=VhostUserDiskSpec(source=str(socket)))
        assert (await stand.vmm.has(), await stand.devices.list()) == ((set(), set()), ())


@in_event_loop
async def test_an_add_that_is_never_answered_is_found_by_what_this_attach_alone_has() -> None:
    with serving(file("image")) as socket:
        async with plugging("clh") as stand:
            for endpoint, spec in (
                ("vm.add-pmem", PmemSpec(source=str(file("memory")))),
                ("vm.add-disk", VhostUserDiskSpec(source=str(socket))),
            ):
                await stand.vmm.misbehave(endpoint, How.NEVER)
                plugged = await stand.devices.confirm(await stand.devices.attach(spec=spec))
                assert (await stand.vmm.has())[0] == {plugged.hypervisor_id}
                await stand.devices.detach(plugged)
