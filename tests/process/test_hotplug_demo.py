"""The demonstration of docs/hotplug.md: the old way fails at each step, ours does not, and the page says how."""

from __future__ import annotations

from pathlib import Path

from common.testing.fake_vmms import UnconfinedCloudHypervisor
from common.testing.hotplug_demo import ATTEMPTS, left_to_clh, old_way, our_way, shortened
from common.testing.hotplug_stand import plugging, plugging_into
from common.testing.isolation import in_event_loop

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs/hotplug.md").read_text()


@in_event_loop
async def test_what_was_only_accepted_is_still_in_the_way() -> None:
    async with plugging() as stand:
        outcomes = await old_way(stand)
        assert {title: refusal for title, (refusal, _) in outcomes.items()} == dict(
            zip(
                ATTEMPTS,
                (
                    "Duplicate nodes with node-name='drive-0'",
                    "PCI: slot 31 function 0 not available for virtio-blk-pci, in use by virtio-blk-pci,id=drive-0",
                    'Failed to get "write" lock',
                ),
                strict=True,
            )
        )
        for _, transcript in outcomes.values():
            assert "\n".join(transcript) in PAGE


@in_event_loop
async def test_names_of_the_hypervisors_choice_cure_one_of_three() -> None:
    async with plugging_into(UnconfinedCloudHypervisor) as stand:
        said = await left_to_clh(stand)
        answers = [line.removeprefix("<- ") for line in said if line.startswith("<- ")]
        refusals = [answer for answer in answers if not answer.startswith(("_disk", "accepted"))]
        assert refusals == [
            "The file is already locked",
            "Could not find an available device slot on the PCI bus",
            "The file is already locked",
        ]
        assert "\n".join(shortened(said)) in PAGE


@in_event_loop
async def test_what_is_confirmed_is_not() -> None:
    async with plugging() as stand:
        said = await our_way(stand)
        assert [line for line in said if line.startswith("<- ") and line != "<- done"] == []
        order = [line.removeprefix("-> ") for line in said if line.startswith(("-> device", "-> block", "**"))]
        assert order == [
            "blockdev-add disk-1",
            "device_add disk-1 bridge0 0x1",
            "device_del disk-1",
            "** DEVICE_DELETED disk-1",
            "blockdev-del disk-1",
            "blockdev-add disk-2",
            "device_add disk-2 bridge0 0x2",
            "device_del disk-2",
            "** DEVICE_DELETED disk-2",
            "blockdev-del disk-2",
        ]
        assert await stand.vmm.has() == (set(), set())
        assert await stand.devices.list() == ()
        assert "\n".join(said) in PAGE
