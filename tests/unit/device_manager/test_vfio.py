"""Which PCI devices of a host a guest can have; the host is a directory that looks like a kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, NotFoundError, StateError, UnsupportedError, UsageError
from common.testing.host_devices import DISK, GPU, SOUND, HostDevices, a_workstation
from procs.device_manager import vfio

if TYPE_CHECKING:
    from pathlib import Path


def refusal(host: HostDevices, address: str) -> KataError:
    with pytest.raises(KataError) as refused:
        vfio.group_of(address, host.sysfs)
    assert refused.value.hint
    return refused.value


@pytest.fixture
def host(tmp_path: Path) -> HostDevices:
    """A GPU and its sound behind a port of the host, and a disk that the host uses."""
    return a_workstation(tmp_path)


def test_devices_of_a_group_that_the_host_does_not_use_can_be_had(host: HostDevices) -> None:
    assert [vfio.group_of(address, host.sysfs) for address in (GPU, SOUND)] == ["12", "12"]
    host.bind(SOUND, "")
    assert vfio.group_of(GPU, host.sysfs) == "12", "nobody drives the other one"
    host.bind(GPU, "mlx5_vfio_pci")
    assert vfio.group_of(GPU, host.sysfs) == "12", "a variant of vfio-pci"


def test_a_device_that_the_host_uses_is_refused(host: HostDevices) -> None:
    assert "PCI device 0000:01:00.0 is driven by nvme and not by vfio-pci" in str(refusal(host, DISK))
    host.bind(DISK, "")
    assert "is driven by nothing" in str(refusal(host, DISK))
    host.bind(SOUND, "snd_hda_intel")
    refused = refusal(host, GPU)
    assert isinstance(refused, StateError)
    assert "0000:3b:00.1, in IOMMU group 12 with 0000:3b:00.0, is driven by snd_hda_intel" in refused.message
    assert "driverctl set-override 0000:3b:00.1 vfio-pci" in str(refused.hint)


def test_a_host_that_keeps_nothing_apart_is_told_how(host: HostDevices) -> None:
    host.add("0000:05:00.0", driver="vfio-pci")
    refused = refusal(host, "0000:05:00.0")
    assert isinstance(refused, UnsupportedError)
    assert "iommu=on" in str(refused.hint)


@pytest.mark.parametrize("address", ["", "3b:00.0", "0000:3b:00.8", "0000:3B:00.0", "../../devices", f"{GPU}/driver"])
def test_what_is_no_address_is_refused(host: HostDevices, address: str) -> None:
    assert isinstance(refusal(host, address), UsageError)


def test_a_device_that_is_not_there_is_not_found(host: HostDevices) -> None:
    assert isinstance(refusal(host, "0000:ff:1f.7"), NotFoundError)
