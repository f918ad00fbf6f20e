"""A Cloud Hypervisor VM with more than one PCI segment, on the fake."""

from __future__ import annotations

from typing import ClassVar

import pytest

from common.errors import ExhaustedError
from common.testing.fake_vmms import CloudHypervisor
from common.testing.hotplug_stand import plugging_into
from common.testing.isolation import in_event_loop


class TwoSegments(CloudHypervisor):
    """One whose VM has two."""

    config: ClassVar[dict[str, object]] = {**CloudHypervisor.config, "default_bridges": 2}


@pytest.mark.parametrize("version", ["53.0.0", "51.1.0"])
@in_event_loop
async def test_what_the_first_segment_has_no_slot_for_goes_to_the_second(version: str) -> None:
    async with plugging_into(TwoSegments, "--as", version) as stand:
        assert [(bus.name, bus.slots) for bus in stand.vm.hotplug_buses] == [("segment0", 29), ("segment1", 31)]
        disks = [await stand.devices.attach(spec=stand.disk(f"d{number}")) for number in range(60)]
        assert [disk.guest_path for disk in disks[28:31]] == ["1f", "0001:01", "0001:02"]
        assert disks[-1].guest_path == "0001:1f"
        before = len(await stand.vmm.transcript())
        with pytest.raises(ExhaustedError, match="no free pci slot: of 60, 60 are held, 0 pending removal"):
            await stand.devices.attach(spec=stand.disk("one-more"))
        assert len(await stand.vmm.transcript()) == before
        for disk in disks[-2:]:
            await stand.devices.detach(await stand.devices.confirm(disk))
        again = await stand.devices.attach(spec=stand.disk("d59"))
        assert (again.bus, again.guest_path) == ("segment1", "0001:1e")
