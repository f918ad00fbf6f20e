"""The guest's network by upstream's calls, with a network device that leads nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common import status
from common.protocols.agent import Empty
from common.protocols.network import (
    IPV4,
    IPV6,
    AddARPNeighborsRequest,
    ARPNeighbor,
    ARPNeighbors,
    Interface,
    Interfaces,
    IPAddress,
    Route,
    Routes,
    UpdateInterfaceRequest,
    UpdateRoutesRequest,
)
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import GuestSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest.image import Image

MAC = "02:00:ca:fe:00:01"
NIC = ("-netdev", "hubport,id=nowhere,hubid=0", "-device", f"virtio-net-pci,netdev=nowhere,mac={MAC}")


@pytest.fixture(scope="module")
def sandbox(image: Image) -> Iterator[GuestSandbox]:
    with GuestSandbox(image.vmlinux, image.initrd, devices=NIC) as running:
        yield running


def update(sandbox: GuestSandbox, *addresses: IPAddress, name: str = "eth0", mac: str = MAC, mtu: int = 0) -> None:
    interface = Interface(name=name, hw_addr=mac, ip_addresses=list(addresses), mtu=mtu)
    sandbox.agent.ask("UpdateInterface", UpdateInterfaceRequest(interface=interface), Interface)


def interface(sandbox: GuestSandbox) -> Interface:
    (found,) = (
        each for each in sandbox.agent.ask("ListInterfaces", Empty(), Interfaces).interfaces if each.hw_addr == MAC
    )
    return found


def v4(address: str, mask: int = 24) -> IPAddress:
    return IPAddress(family=IPV4, address=address, mask=str(mask))


def said(sandbox: GuestSandbox, *command: str) -> str:
    task = sandbox.run(*command)
    output = task.stdout.read_all().decode()
    task.wait()
    task.remove()
    return output


def test_an_interface_gets_name_addresses_and_mtu(sandbox: GuestSandbox) -> None:
    six = IPAddress(family=IPV6, address="fd00::2", mask="64")
    update(sandbox, v4("10.1.0.2"), six, name="first", mtu=1400)
    found = interface(sandbox)
    assert (found.name, found.mtu) == ("first", 1400)
    assert v4("10.1.0.2") in found.ip_addresses
    assert six in found.ip_addresses
    assert "UP" in said(sandbox, "ip", "link", "show", "first")


def test_it_can_be_changed(sandbox: GuestSandbox) -> None:
    update(sandbox, v4("10.2.0.2"), v4("10.2.0.3"), name="second")
    found = interface(sandbox)
    assert found.name == "second"
    assert [each for each in found.ip_addresses if each.family == IPV4] == [v4("10.2.0.2"), v4("10.2.0.3")]


def ours(routes: list[Route]) -> list[Route]:
    """Leave out those of IPv6, which the kernel makes by itself when it has found its address to be free."""
    return [route for route in routes if not route.family]


def test_routes_are_added_in_an_order_that_the_kernel_takes(sandbox: GuestSandbox) -> None:
    update(sandbox, v4("10.3.0.2"))
    default = Route(gateway="192.168.9.1", device="eth0", mtu=1300)
    to_gateway = Route(dest="192.168.9.1/32", device="eth0", scope=253, source="10.3.0.2")
    request = UpdateRoutesRequest(routes=Routes(routes=[default, to_gateway]))
    told = sandbox.agent.ask("UpdateRoutes", request, Routes).routes
    assert default in told
    assert to_gateway in told
    listed = sandbox.agent.ask("ListRoutes", Empty(), Routes).routes
    assert ours(listed) == ours(told)
    assert "default via 192.168.9.1 dev eth0" in said(sandbox, "ip", "route")


def test_a_neighbour(sandbox: GuestSandbox) -> None:
    update(sandbox, v4("10.4.0.2"))
    neighbour = ARPNeighbor(to_ip_address=IPAddress(address="10.4.0.9"), device="eth0", lladdr="02:00:00:00:00:09")
    request = AddARPNeighborsRequest(neighbors=ARPNeighbors(neighbors=[neighbour]))
    sandbox.agent.ask("AddARPNeighbors", request, Empty)
    assert "10.4.0.9 dev eth0 lladdr 02:00:00:00:00:09" in said(sandbox, "ip", "neigh")


def test_an_interface_that_does_not_come_is_told(sandbox: GuestSandbox) -> None:
    with pytest.raises(AgentError, match="Link not found") as refused:
        update(sandbox, mac="02:00:00:00:00:99")
    assert refused.value.code == status.NOT_FOUND


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mac": "nonsense"}, "not a hardware address"),
        ({"name": "a/b"}, "whose name the kernel would not take"),
        ({"name": "x" * 16}, "whose name the kernel would not take"),
    ],
)
def test_what_is_no_interface_is_refused(sandbox: GuestSandbox, change: dict[str, str], told: str) -> None:
    with pytest.raises(AgentError, match=told) as refused:
        update(sandbox, **change)  # type: ignore[arg-type]
    assert refused.value.code == status.INVALID_ARGUMENT


@pytest.mark.parametrize("address", [v4("10.0.0.300"), v4("10.0.0.1", 33)])
def test_what_is_no_address_is_refused(sandbox: GuestSandbox, address: IPAddress) -> None:
    with pytest.raises(AgentError) as refused:
        update(sandbox, address)
    assert refused.value.code == status.INVALID_ARGUMENT


def test_a_route_that_cannot_be_is_told(sandbox: GuestSandbox) -> None:
    request = UpdateRoutesRequest(routes=Routes(routes=[Route(gateway="172.30.0.1", device="eth0")]))
    with pytest.raises(AgentError, match="route to anywhere by eth0"):
        sandbox.agent.ask("UpdateRoutes", request, Routes)
    absent = UpdateRoutesRequest(routes=Routes(routes=[Route(dest="10.9.0.0/16", device="absent")]))
    with pytest.raises(AgentError, match="Link not found"):
        sandbox.agent.ask("UpdateRoutes", absent, Routes)
