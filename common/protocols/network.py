"""Kata's agent protocol, service ``grpc.AgentService``: network interfaces, routes and neighbours of the guest.

Field numbers and names are those of ``agent.proto`` and ``types.proto`` of Kata Containers 4.1.0
(src/libs/protocols/protos). Imported when the first of these calls comes.
"""

from __future__ import annotations

from common.protobuf import Message, int_, message, messages, string, uint

IPV4, IPV6 = 0, 1
"""``IPFamily``."""


class IPAddress(Message):
    """An address. ``mask`` is the length of its prefix, in decimal."""

    family: int = uint(1)
    address: str = string(2)
    mask: str = string(3)


class Interface(Message):
    """A network interface.

    Attributes:
        device: the host's name for it.
        name: the guest's.
        ip_addresses: all that it has, or shall have.
        mtu: in bytes; 0 leaves it.
        hw_addr: its hardware address, by which the guest finds it.
        device_path: its PCI path.
        type: its kind on the host.
        raw_flags: ``IFF_NOARP`` of netdevice(7), or nothing.
    """

    device: str = string(1)
    name: str = string(2)
    ip_addresses: list[IPAddress] = messages(3, IPAddress)
    mtu: int = uint(4)
    hw_addr: str = string(5)
    device_path: str = string(6)
    type: str = string(7)
    raw_flags: int = uint(8)


class UpdateInterfaceRequest(Message):
    """``UpdateInterface``, answered with the interface."""

    interface: Interface | None = message(1, Interface)


class Interfaces(Message):
    """The answer of ``ListInterfaces``."""

    interfaces: list[Interface] = messages(1, Interface)


class Route(Message):
    """A route of the main table.

    Attributes:
        dest: ``<address>/<prefix length>``, or nothing for the default route.
        gateway: the next hop's address, or nothing.
        device: the guest's name of the interface.
        source: the address that packets are sent from, or nothing.
        scope: ``rtm_scope`` of rtnetlink(7).
        family: ``IPV4`` or ``IPV6``.
        flags: ``rtm_flags``.
        mtu: in bytes; 0 is the interface's.
    """

    dest: str = string(1)
    gateway: str = string(2)
    device: str = string(3)
    source: str = string(4)
    scope: int = uint(5)
    family: int = uint(6)
    flags: int = uint(7)
    mtu: int = uint(8)


class Routes(Message):
    """The answer of ``UpdateRoutes`` and ``ListRoutes``."""

    routes: list[Route] = messages(1, Route)


class UpdateRoutesRequest(Message):
    """``UpdateRoutes``: routes to add or to replace, answered with all."""

    routes: Routes | None = message(1, Routes)


class ARPNeighbor(Message):
    """A neighbour whose hardware address is known; ``state`` and ``flags`` as in rtnetlink(7), 0 being permanent."""

    to_ip_address: IPAddress | None = message(1, IPAddress)
    device: str = string(2)
    lladdr: str = string(3)
    state: int = int_(4)
    flags: int = int_(5)


class ARPNeighbors(Message):
    """Neighbours."""

    neighbors: list[ARPNeighbor] = messages(1, ARPNeighbor)


class AddARPNeighborsRequest(Message):
    """``AddARPNeighbors``."""

    neighbors: ARPNeighbors | None = message(1, ARPNeighbors)
