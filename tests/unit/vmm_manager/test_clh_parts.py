"""What is asked of Cloud Hypervisor while a guest has not yet given back what it was asked for before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from common import paths
from common.config import ClhConfig
from common.errors import UnavailableError
from common.services.vmm import AddDevice, AddedDevice, BusKind, CpuSpec, HotplugBus
from common.testing.fake_cloud_hypervisor.totals import RefusalError, Totals
from common.testing.isolation import in_event_loop
from common.workers import Workers
from procs.vmm_manager.drivers.cloud_hypervisor.api import Api, meaning_of
from procs.vmm_manager.drivers.cloud_hypervisor.api import RefusalError as Refusal
from procs.vmm_manager.drivers.cloud_hypervisor.parts import Cpus, Parts
from procs.vmm_manager.record import VmRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from procs.vmm_manager.drivers.spawn import Process

CONFIG = ClhConfig()
BUS = HotplugBus(name="cpus", kind=BusKind.CPU, slots=3)


class TotalsApi:
    """The fake's totals behind what stands for a connection to it."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {"cpus": {"boot_vcpus": 1, "max_vcpus": 4}, "memory": {"size": 1 << 30}}
        self.totals = Totals(self.config)

    async def get(self, _what: str) -> dict[str, Any]:
        return {"config": self.config, "memory_actual_size": self.totals.memory}

    async def put(self, what: str, body: Mapping[str, int], **_: object) -> None:
        try:
            self.totals.resize(body)
        except RefusalError as err:
            meaning = meaning_of(err.status, err.reasons, what)
            raise meaning from Refusal(meaning)


class Running:
    """Stands for a VMM that lives."""

    is_running = True


def request(number: int) -> AddDevice:
    return AddDevice(sandbox_id="s", spec=CpuSpec(number=number), bus="cpus", slot=number - 1, serial=f"{number:020x}")


async def gone(parts: Parts, removed: list[str], *names: str) -> None:
    """Wait until these are told gone, and see that the list has them no more."""
    while set(removed) != set(names):  # noqa: ASYNC110 - nothing tells but what is looked at
        await asyncio.sleep(0.01)
    assert not {device.hypervisor_id for device in await parts.present()} & set(names)


@pytest.mark.usefixtures("run_dir")
@in_event_loop
async def test_while_a_guest_gives_back_an_add_is_told_to_come_again_and_a_second_removal_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(paths.vm_dir("s")).mkdir(parents=True)
    api, removed, record = TotalsApi(), list[str](), VmRecord(sandbox_id="s", config=CONFIG)
    async with Workers() as workers:
        connection, vmm = cast("Api", api), cast("Process", Running())
        parts = Parts(record, [BUS], [Cpus(CONFIG, connection)], connection, vmm, workers, removed.append)
        assert [await parts.add(request(number)) for number in (1, 2)] == [
            AddedDevice(hypervisor_id=f"cpu-{number}") for number in (1, 2)
        ]
        await parts.remove("cpu-1")
        monkeypatch.setattr("procs.vmm_manager.drivers.cloud_hypervisor.parts.TIMEOUT_S", 0.2)
        with pytest.raises(UnavailableError, match="the guest has been asked for cpu-1 and has not given that back"):
            await parts.add(request(3))
        await parts.remove("cpu-2")  # accepted, and asked for when the guest has given one back
        assert api.config["cpus"]["boot_vcpus"] == 2
        assert [device.hypervisor_id for device in await parts.present()] == ["cpu-1", "cpu-2"]
        api.totals.follow()
        await gone(parts, removed, "cpu-1")
        assert (api.totals.vcpus, api.config["cpus"]["boot_vcpus"]) == (2, 1)
        api.totals.follow()
        await gone(parts, removed, "cpu-1", "cpu-2")
        assert api.totals.vcpus == 1
