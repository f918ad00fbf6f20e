"""A disk of the host that a guest has whole, on real hypervisors and behind a real IOMMU."""

from __future__ import annotations

import os

import pytest

from common.services.vmm import VfioSpec
from common.testing.fake_vmms import trust_kvm
from common.testing.hotplug_stand import running
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import CH_VARIABLE, REAL
from common.testing.spare_disk import SpareDisk, spare_disk
from common.testing.stack import IMAGE, RUNTIME, Stack

BRIDGE: dict[str, object] = {"hot_plug_vfio": "bridge-port"}
ROOT_PORT: dict[str, object] = {"hot_plug_vfio": "root-port", "pcie_root_port": 1}
CLH = {"clh": ("clh", {"hot_plug_vfio": "root-port", "path": os.environ[CH_VARIABLE]})} if "clh-real" in REAL else {}
HOT = {"qemu, a bridge": ("qemu", BRIDGE), "qemu, a root port": ("qemu", ROOT_PORT), **CLH}
WAYS = {**HOT, "qemu, cold": ("qemu", {"cold_plug_vfio": "root-port"})}
ROUNDS = 3
BOOT_TIMEOUT_S = 600
RUN_TIMEOUT_S = 900
SCRIPT = """
until [ -e /sys/block/nvme0n1/dev ]; do sleep 1; done
mknod /disk b $(tr : ' ' < /sys/block/nvme0n1/dev)
head -c 5 /disk
printf new | dd of=/disk conv=notrunc,fsync 2> /dev/null
ls /dev/vfio
"""


@pytest.mark.parametrize(("hypervisor", "section"), WAYS.values(), ids=WAYS)
def test_a_container_reads_and_writes_a_disk_that_its_guest_has_whole(
    hypervisor: str, section: dict[str, object]
) -> None:
    disk = the_disk()
    disk.write(b"right")
    host = Stack(hypervisor=hypervisor, section=section)
    host.run_dir.mkdir(mode=0o700)
    trust_kvm(host.run_dir)  # to find out takes longer here than a shim waits
    with host as stack:
        stack.write_config(agent={"dial_timeout": BOOT_TIMEOUT_S})
        with disk.lent():
            flags = ("--rm", "--privileged", "--device", f"/dev/vfio/{disk.group}", "--runtime", RUNTIME)
            done = stack.ctr("run", *flags, IMAGE, "c1", "sh", "-c", SCRIPT, timeout_s=RUN_TIMEOUT_S)
            devices = stack.remains()
        print(done, stack.logs())  # noqa: T201 - for who looks at a failure
        assert (done.stdout, devices) == (b"right", [])
        assert b"/dev/vfio: No such file or directory" in done.stderr
    assert disk.read(5) == b"newht", "what the container wrote"


@pytest.mark.parametrize(("hypervisor", "section"), HOT.values(), ids=HOT)
@in_event_loop
async def test_what_a_running_guest_has_let_go_is_the_hosts_at_once(
    hypervisor: str, section: dict[str, object]
) -> None:
    disk = the_disk()
    spec = VfioSpec(source=disk.address, is_express=section is ROOT_PORT)
    async with running(hypervisor, section) as (_, devices):
        for number in range(ROUNDS):
            with disk.lent():
                given = await devices.confirm(await devices.attach(spec=spec))
                await devices.detach(given)
            content = f"round {number}".encode()
            disk.write(content)
            assert disk.read(len(content)) == content, "the host's own driver has it"
        assert await devices.list() == ()


def the_disk() -> SpareDisk:
    """Return the disk, without which nothing here is collected."""
    disk = spare_disk()
    assert disk is not None
    return disk
