"""A sandbox that cannot come up: the client is told phase, cause and remedy, and nothing is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import HypervisorError, KataError
from common.testing.fake_guest import Refusal
from common.testing.shim_client import refusal, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


@stand_test
async def test_a_hypervisor_that_fails_is_told_at_create(stand: ShimStand) -> None:
    stand.vms.error = HypervisorError("kernel /x is no kernel", hint="build it again")
    shim = await started(stand)
    with pytest.raises(KataError, match=r"failed while starting the VM: kernel /x is no kernel \(build it again\)"):
        await shim.create("true")
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_configuration_that_is_wrong_is_told_at_create(stand: ShimStand) -> None:
    stand.config.write_text("[hypervisor.qemu\n")
    shim = await started(stand)
    with pytest.raises(KataError, match=f"{stand.config} is not valid TOML"):
        await shim.create("true")
    assert stand.vms.calls == []


@stand_test
async def test_a_guest_that_never_answers_is_told_with_its_console(stand: ShimStand) -> None:
    stand.write_config(dial_timeout=1)
    stand.vms.is_guest_silent = True
    stand.vms.console = "Kernel panic - not syncing: No working init found"
    shim = await started(stand)
    with pytest.raises(KataError) as failure:
        await shim.create("true")
    text = str(failure.value)
    remedy = f"raise agent.kata.dial_timeout in {stand.config}"
    for part in ("waiting for the guest's agent", "within 1 s", "No working init found", remedy):
        assert part in text
    await shim.shutdown()
    await stand.wait_shim_gone()
    assert stand.leftovers() == []


@stand_test
async def test_a_vm_that_ends_while_booting_is_told_at_once(stand: ShimStand) -> None:
    stand.vms.is_guest_silent = True
    shim = await started(stand)
    creating = stand.spawn(refusal(shim.create("true")))
    await stand.vms.has_vm.wait()
    assert stand.vms.guest is not None
    await stand.vms.guest.channel.has_hello.wait()
    await stand.vms.end_vm()
    text = str(await creating)
    assert "failed while waiting for the guest's agent: the guest ended before its agent answered" in text
    assert "the VM is ended" in text


@stand_test
async def test_a_share_that_the_guest_cannot_mount_is_aborted(stand: ShimStand) -> None:
    shim = await started(stand)
    await stand.vms.has_vm.wait()
    assert stand.vms.guest is not None
    stand.vms.guest.refusals["CreateSandbox"] = Refusal(13, "no device with that tag")
    with pytest.raises(KataError, match="sharing the file system: no device with that tag"):
        await shim.create("true")
    assert stand.devices.calls == ["attach", "abort"]
