"""Links, addresses, routes and neighbours of the kernel (rtnetlink(7)), as much as the agent sets.

A request is answered at once, so it is waited for. Structures: linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h,
linux/neighbour.h. What is packed here is in the byte order of the machine.
"""

from __future__ import annotations

import _socket
import posix
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Attributes = dict[int, bytes]

IFF_UP, IFF_NOARP = 0x1, 0x80
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
NUD_PERMANENT = 0x80

_NETLINK_ROUTE = 0
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxHiHBB")
_NUMBER = struct.Struct("=I")

_ERROR, _DONE = 2, 3
_NEW_LINK, _GET_LINK = 16, 18
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_NEIGHBOUR = 28
_REQUEST, _ACK, _DUMP, _REPLACE, _CREATE = 0x1, 0x4, 0x300, 0x100, 0x400

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS, _RTAX_MTU = 1, 4, 5, 7, 8, 2
_NDA_DST, _NDA_LLADDR = 1, 2
_TABLE_MAIN, _PROTOCOL_BOOT, _UNICAST = 254, 3, 1
_FAMILIES = {4: _socket.AF_INET, 16: _socket.AF_INET6}
"""By the length of an address."""


class Link:
    """An interface as the kernel has it."""

    def __init__(self, index: int, flags: int, attributes: Attributes) -> None:
        self.index = index
        self.is_up = bool(flags & IFF_UP)
        self.name = attributes[_IFLA_IFNAME].rstrip(b"\0").decode()
        self.mtu = _NUMBER.unpack(attributes[_IFLA_MTU])[0]
        self.hardware = attributes.get(_IFLA_ADDRESS, b"")


class Address:
    """An address of an interface: ``packed`` is 4 or 16 bytes."""

    def __init__(self, index: int, prefix: int, scope: int, packed: bytes) -> None:
        self.index = index
        self.prefix = prefix
        self.scope = scope
        self.packed = packed


class Route:
    """A unicast route of the main table; what it has not is empty or 0."""

    def __init__(
        self,
        index: int,
        *,
        family: int,
        destination: bytes = b"",
        prefix: int = 0,
        gateway: bytes = b"",
        source: bytes = b"",
        scope: int = 0,
        flags: int = 0,
        mtu: int = 0,
    ) -> None:
        self.index = index
        self.family = family
        self.destination = destination
        self.prefix = prefix
        self.gateway = gateway
        self.source = source
        self.scope = scope
        self.flags = flags
        self.mtu = mtu


class Rtnetlink:
    """A socket to the kernel's network."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._sequence = 0

    def close(self) -> None:
        """Give it up."""
        self._socket.close()

    def links(self) -> list[Link]:
        """Return all interfaces."""
        found = []
        for body in self._dump(_GET_LINK, _LINK.pack(0, 0, 0, 0, 0)):
            _, _, index, flags, _ = _LINK.unpack_from(body)
            found.append(Link(index, flags, _attributes(body[_LINK.size :])))
        return found

    def set_link(self, index: int, *, is_up: bool, name: str = "", mtu: int = 0, is_silent: bool = False) -> None:
        """Change an interface; what is not named stays. A silent one does without ARP.

        Raises:
            OSError: the kernel refuses.
        """
        flags = (IFF_UP if is_up else 0) | (IFF_NOARP if is_silent else 0)
        mask = IFF_UP | (IFF_NOARP if is_silent else 0)
        parts = [_LINK.pack(0, 0, index, flags, mask)]
        if name:
            parts.append(_attribute(_IFLA_IFNAME, name.encode() + b"\0"))
        if mtu:
            parts.append(_attribute(_IFLA_MTU, _NUMBER.pack(mtu)))
        self._change(_NEW_LINK, 0, parts)

    def addresses(self) -> list[Address]:
        """Return the addresses of all interfaces."""
        found = []
        for body in self._dump(_GET_ADDRESS, _ADDRESS.pack(0, 0, 0, 0, 0)):
            _, prefix, _, scope, index = _ADDRESS.unpack_from(body)
            attributes = _attributes(body[_ADDRESS.size :])
            packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
            found.append(Address(index, prefix, scope, packed))
        return found

    def add_address(self, address: Address) -> None:
        """Give an interface an address, or the same again.

        Raises:
            OSError: the kernel refuses.
        """
        self._change(_NEW_ADDRESS, _CREATE | _REPLACE, _address_parts(address))

    def remove_address(self, address: Address) -> None:
        """Take an address from an interface.

        Raises:
            OSError: the kernel refuses.
        """
        self._change(_DELETE_ADDRESS, 0, _address_parts(address))

    def routes(self) -> list[Route]:
        """Return the unicast routes of the main table."""
        found = []
        for body in self._dump(_GET_ROUTE, _ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)):
            family, prefix, _, _, table, _, scope, kind, flags = _ROUTE.unpack_from(body)
            attributes = _attributes(body[_ROUTE.size :])
            if table != _TABLE_MAIN or kind != _UNICAST or _RTA_OIF not in attributes:
                continue
            metrics = _attributes(attributes.get(_RTA_METRICS, b""))
            found.append(
                Route(
                    _NUMBER.unpack(attributes[_RTA_OIF])[0],
                    family=family,
                    destination=attributes.get(_RTA_DST, b""),
                    prefix=prefix,
                    gateway=attributes.get(_RTA_GATEWAY, b""),
                    source=attributes.get(_RTA_PREFSRC, b""),
                    scope=scope,
                    flags=flags,
                    mtu=_NUMBER.unpack(metrics[_RTAX_MTU])[0] if _RTAX_MTU in metrics else 0,
                )
            )
        return found

    def add_route(self, route: Route) -> None:
        """Add a route, or replace the one of the same destination.

        Raises:
            OSError: the kernel refuses.
        """
        header = (route.family, route.prefix, 0, 0, _TABLE_MAIN, _PROTOCOL_BOOT, route.scope, _UNICAST, route.flags)
        parts = [_ROUTE.pack(*header), _attribute(_RTA_OIF, _NUMBER.pack(route.index))]
        for kind, value in ((_RTA_DST, route.destination), (_RTA_GATEWAY, route.gateway), (_RTA_PREFSRC, route.source)):
            if value:
                parts.append(_attribute(kind, value))
        if route.mtu:
            parts.append(_attribute(_RTA_METRICS, _attribute(_RTAX_MTU, _NUMBER.pack(route.mtu))))
        self._change(_NEW_ROUTE, _CREATE | _REPLACE, parts)

    def add_neighbour(self, index: int, packed: bytes, hardware: bytes, state: int, flags: int) -> None:
        """Say which hardware address a neighbour has.

        Raises:
            OSError: the kernel refuses.
        """
        parts = [_NEIGHBOUR.pack(_FAMILIES[len(packed)], 0, index, state, flags, 0), _attribute(_NDA_DST, packed)]
        if hardware:
            parts.append(_attribute(_NDA_LLADDR, hardware))
        self._change(_NEW_NEIGHBOUR, _CREATE | _REPLACE, parts)

    def _dump(self, kind: int, body: bytes) -> list[bytes]:
        return list(self._exchange(kind, _DUMP, body))

    def _change(self, kind: int, flags: int, parts: list[bytes]) -> None:
        for _ in self._exchange(kind, flags | _ACK, b"".join(parts)):
            pass

    def _exchange(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        """Send a request; yield what the kernel answers until it says that this was all."""
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            data = self._socket.recv(1 << 16)
            while data:
                length, answer, _, sequence, _ = _HEADER.unpack_from(data)
                payload, data = data[_HEADER.size : length], data[_aligned(length) :]
                if sequence != self._sequence:
                    continue
                if answer == _DONE:
                    return
                if answer == _ERROR:
                    code = -struct.unpack_from("=i", payload)[0]
                    if code:
                        raise OSError(code, posix.strerror(code))
                    return
                yield payload


def _address_parts(address: Address) -> list[bytes]:
    family = _FAMILIES[len(address.packed)]
    return [
        _ADDRESS.pack(family, address.prefix, 0, address.scope, address.index),
        _attribute(_IFA_LOCAL, address.packed),
        _attribute(_IFA_ADDRESS, address.packed),
    ]


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _attributes(data: bytes) -> Attributes:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(max(length, _ATTRIBUTE.size)) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
