"""Which PCI devices of a host a guest can have; the host is a directory that looks like a kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, NotFoundError, StateError, UnsupportedError, UsageError
from procs.device_manager import vfio

if TYPE_CHECKING:
    from pathlib import Path

GPU, SOUND, PORT, DISK = "0000:3b:00.0", "0000:3b:00.1", "0000:3a:01.0", "0000:01:00.0"


class Host:
    """A kernel's view of PCI devices."""

    def __init__(self, sysfs: Path) -> None:
        self.sysfs = sysfs

    def add(self, address: str, group: str = "", driver: str = "", kind: str = "0x030200") -> Path:
        device = self.sysfs / "devices" / address
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
        self._link(self.sysfs / "bus/pci/devices" / address, device)
        if driver:
            self.bind(address, driver)
        if group:
            members = self.sysfs / "kernel/iommu_groups" / group / "devices"
            self._link(members / address, device)
            self._link(device / "iommu_group", members.parent)
        return device

    def bind(self, address: str, driver: str) -> None:
        link = self.sysfs / "devices" / address / "driver"
        link.unlink(missing_ok=True)
        if driver:
            self._link(link, self.sysfs / "bus/pci/drivers" / driver)

    def _link(self, link: Path, target: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)

    def refusal(self, address: str) -> KataError:
        with pytest.raises(KataError) as refused:
            vfio.group_of(address, self.sysfs)
        assert refused.value.hint
        return refused.value


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A GPU and its sound behind a port of the host, and a disk that the host uses."""
    made = Host(tmp_path)
    made.add(GPU, "12", "vfio-pci")
    made.add(SOUND, "12", "vfio-pci", "0x040300")
    made.add(PORT, "12", "pcieport", "0x060400")
    made.add(DISK, "7", "nvme", "0x010802")
    return made


def test_devices_of_a_group_that_the_host_does_not_use_can_be_had(host: Host) -> None:
    assert [vfio.group_of(address, host.sysfs) for address in (GPU, SOUND)] == ["12", "12"]
    host.bind(SOUND, "")
    assert vfio.group_of(GPU, host.sysfs) == "12", "nobody drives the other one"
    host.bind(GPU, "mlx5_vfio_pci")
    assert vfio.group_of(GPU, host.sysfs) == "12", "a variant of vfio-pci"


def test_a_device_that_the_host_uses_is_refused(host: Host) -> None:
    assert "PCI device 0000:01:00.0 is driven by nvme and not by vfio-pci" in str(host.refusal(DISK))
    host.bind(DISK, "")
    assert "is driven by nothing" in str(host.refusal(DISK))
    host.bind(SOUND, "snd_hda_intel")
    refused = host.refusal(GPU)
    assert isinstance(refused, StateError)
    assert "0000:3b:00.1, in IOMMU group 12 with 0000:3b:00.0, is driven by snd_hda_intel" in refused.message
    assert "driverctl set-override 0000:3b:00.1 vfio-pci" in str(refused.hint)


def test_a_host_that_keeps_nothing_apart_is_told_how(host: Host) -> None:
    host.add("0000:05:00.0", driver="vfio-pci")
    refused = host.refusal("0000:05:00.0")
    assert isinstance(refused, UnsupportedError)
    assert "iommu=on" in str(refused.hint)


@pytest.mark.parametrize("address", ["", "3b:00.0", "0000:3b:00.8", "0000:3B:00.0", "../../devices", f"{GPU}/driver"])
def test_what_is_no_address_is_refused(host: Host, address: str) -> None:
    assert isinstance(host.refusal(address), UsageError)


def test_a_device_that_is_not_there_is_not_found(host: Host) -> None:
    assert isinstance(host.refusal("0000:ff:1f.7"), NotFoundError)
