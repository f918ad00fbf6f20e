"""Which devices of the host a guest gets for a group that its container is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.config import ClhConfig, FirecrackerConfig, HypervisorConfig, QemuConfig, VfioPort
from common.errors import KataError, NotFoundError, UnsupportedError
from common.services.vmm import VfioSpec
from common.testing.host_devices import GPU, GROUP, NUMBER, SOUND, VFIO_NUMBER, a_host_with_devices
from procs.shim import vfio
from procs.shim.spec import HostGroup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from common.testing.host_devices import HostDevices

BRIDGE = QemuConfig(hot_plug_vfio=VfioPort.BRIDGE_PORT)


@pytest.fixture(autouse=True)
def host(tmp_path: Path) -> Iterator[HostDevices]:
    """A GPU and its sound, in one group."""
    with a_host_with_devices(tmp_path) as made:
        yield made


def test_a_node_is_known_by_its_number(host: HostDevices) -> None:
    host.add_node(241, 9, "vfio/noiommu-0")
    host.add_node(1, 3, "null")
    numbers = (NUMBER, VFIO_NUMBER, (241, 9), (1, 3), (1, 5))
    assert [vfio.name_of(*number) for number in numbers] == [GROUP, "vfio", "noiommu-0", "", ""]


@pytest.mark.parametrize(
    ("config", "is_express"),
    [
        (BRIDGE, False),
        (QemuConfig(hot_plug_vfio=VfioPort.ROOT_PORT), True),
        (QemuConfig(cold_plug_vfio=VfioPort.ROOT_PORT), True),
        (ClhConfig(hot_plug_vfio=VfioPort.ROOT_PORT), False),
    ],
)
def test_all_devices_of_a_group_but_the_hosts_bridges(config: HypervisorConfig, *, is_express: bool) -> None:
    found = vfio.of_group(HostGroup(path="/dev/vfio/12", name=GROUP), config)
    assert found.functions == tuple(VfioSpec(source=address, is_express=is_express) for address in (GPU, SOUND))


@pytest.mark.parametrize(
    ("name", "config", "kind", "said"),
    [
        (GROUP, QemuConfig(), UnsupportedError, "/dev/x of the host is asked for, and the configuration gives guests"),
        (GROUP, FirecrackerConfig(), UnsupportedError, "the configuration gives guests none"),
        ("noiommu-0", BRIDGE, UnsupportedError, "is the host's /dev/vfio/noiommu-0, which cannot be handed"),
        ("devices/vfio0", BRIDGE, UnsupportedError, "cannot be handed to a guest"),
        ("99", BRIDGE, NotFoundError, "the host has no IOMMU group 99"),
    ],
)
def test_what_no_guest_can_have_is_refused(
    name: str, config: HypervisorConfig, kind: type[KataError], said: str
) -> None:
    with pytest.raises(kind, match=said) as refused:
        vfio.of_group(HostGroup(path="/dev/x", name=name), config)
    assert refused.value.hint
