"""The guest's network as the host wants it: ``UpdateInterface``, ``UpdateRoutes``, ``AddARPNeighbors`` and the lists.

An interface is found by its hardware address, since the guest's kernel has named it by itself. One whose device has not
come yet is waited for.
"""

from __future__ import annotations

import _socket
import errno

from common import status
from common.protocols import network as messages
from common.protocols.agent import Empty
from guest.agent import modules, rtnetlink
from guest.agent.files import read_text
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ports import Uevents
    from guest.agent.reactor import Reactor
    from guest.agent.rpc import Call, Methods

_WAIT_S = 3.0
"""How long an interface may take to come; upstream's ``agent.hotplug_timeout``."""
_HARDWARE_SIZE = 6
_MAX_NAME = 15
"""IFNAMSIZ without its zero."""
_FAMILIES = {messages.IPV4: _socket.AF_INET, messages.IPV6: _socket.AF_INET6}


class Network:
    """Answers the calls; each looks at the kernel anew."""

    def __init__(self, reactor: Reactor, uevents: Uevents) -> None:
        self._reactor = reactor
        self._uevents = uevents
        self._kernel = rtnetlink.Rtnetlink()

    def methods(self) -> Methods:
        """Return the verbs by name."""
        return {
            "UpdateInterface": (messages.UpdateInterfaceRequest, self.update_interface),
            "UpdateRoutes": (messages.UpdateRoutesRequest, self.update_routes),
            "ListInterfaces": (Empty, self.list_interfaces),
            "ListRoutes": (Empty, self.list_routes),
            "AddARPNeighbors": (messages.AddARPNeighborsRequest, self.add_neighbours),
        }

    def update_interface(self, request: messages.UpdateInterfaceRequest, call: Call) -> None:
        """Answer when an interface has its name, addresses and MTU and is up.

        Raises:
            RpcError: the request is malformed.
        """
        wanted = request.interface
        if wanted is None or not 1 <= len(wanted.name) <= _MAX_NAME or "/" in wanted.name:
            raise RpcError(status.INVALID_ARGUMENT, "no interface, or one whose name the kernel would not take")
        hardware = _hardware(wanted.hw_addr)
        addresses = [(_packed(each.address), _prefix(each)) for each in wanted.ip_addresses]
        modules.load("net")

        def attempt() -> None:
            link = next((link for link in self._kernel.links() if link.hardware == hardware), None)
            if link is None:
                return
            finish()
            try:
                self._set_up(link, wanted, addresses)
            except OSError as err:
                call.fail(status.INTERNAL, f"interface {wanted.name}: {err.strerror}")
            else:
                call.reply(wanted)

        def finish() -> None:
            timer.cancel()
            self._uevents.unlisten(attempt)

        def expire() -> None:
            finish()
            call.fail(status.NOT_FOUND, f"Link not found (Address: {wanted.hw_addr}) within {_WAIT_S:.0f} s")

        timer = self._reactor.later(_WAIT_S, expire)
        self._uevents.listen(attempt)
        attempt()

    def update_routes(self, request: messages.UpdateRoutesRequest, call: Call) -> messages.Routes:
        """Add routes or replace them: those without a gateway first, since the others' gateways are reached by them."""
        routes = request.routes.routes if request.routes else []
        for route in sorted(routes, key=lambda each: bool(each.gateway)):
            destination, _, prefix = route.dest.partition("/")
            packed = _packed(destination) if destination else b""
            family = _FAMILIES[messages.IPV6 if route.family == messages.IPV6 else messages.IPV4]
            made = rtnetlink.Route(
                self._index(route.device),
                family=family,
                destination=packed,
                prefix=int(prefix or len(packed) * 8),
                gateway=_packed(route.gateway) if route.gateway else b"",
                source=_packed(route.source.partition("/")[0]) if route.source else b"",
                scope=route.scope & 0xFF,
                flags=route.flags,
                mtu=route.mtu,
            )
            try:
                self._kernel.add_route(made)
            except OSError as err:
                text = f"route to {route.dest or 'anywhere'} by {route.device}: {err.strerror}"
                raise RpcError(status.INTERNAL, text) from err
        return self.list_routes(Empty(), call)

    def list_interfaces(self, _request: Empty, _call: Call) -> messages.Interfaces:
        """Return all interfaces with their addresses."""
        modules.load("net")
        addresses = self._kernel.addresses()
        return messages.Interfaces(
            interfaces=[
                messages.Interface(
                    name=link.name,
                    mtu=link.mtu,
                    hw_addr=":".join(f"{byte:02x}" for byte in link.hardware),
                    ip_addresses=[_told(each) for each in addresses if each.index == link.index],
                )
                for link in self._kernel.links()
            ]
        )

    def list_routes(self, _request: Empty, _call: Call) -> messages.Routes:
        """Return the routes."""
        names = {link.index: link.name for link in self._kernel.links()}
        return messages.Routes(
            routes=[
                messages.Route(
                    dest=f"{_text(route.destination)}/{route.prefix}" if route.destination else "",
                    gateway=_text(route.gateway),
                    device=names.get(route.index, ""),
                    source=_text(route.source),
                    scope=route.scope,
                    family=messages.IPV6 if route.family == _socket.AF_INET6 else messages.IPV4,
                    flags=route.flags,
                    mtu=route.mtu,
                )
                for route in self._kernel.routes()
            ]
        )

    def add_neighbours(self, request: messages.AddARPNeighborsRequest, _call: Call) -> Empty:
        """Say which hardware addresses neighbours have."""
        for each in request.neighbors.neighbors if request.neighbors else ():
            if each.to_ip_address is None:
                raise RpcError(status.INVALID_ARGUMENT, "a neighbour without address")
            index, packed = self._index(each.device), _packed(each.to_ip_address.address)
            hardware = _hardware(each.lladdr) if each.lladdr else b""
            try:
                self._kernel.add_neighbour(
                    index, packed, hardware, each.state & 0xFFFF or rtnetlink.NUD_PERMANENT, each.flags & 0xFF
                )
            except OSError as err:
                text = f"neighbour {each.to_ip_address.address} of {each.device}: {err.strerror}"
                raise RpcError(status.INTERNAL, text) from err
        return Empty()

    def _set_up(self, link: rtnetlink.Link, wanted: messages.Interface, addresses: list[tuple[bytes, int]]) -> None:
        """Make an interface what is wanted. Only one that is down can be renamed."""
        if link.name != wanted.name:
            self._make_room(link, wanted.name)
            self._kernel.set_link(link.index, is_up=False)
            self._kernel.set_link(link.index, is_up=False, name=wanted.name)
        for old in self._kernel.addresses():
            if old.index == link.index and old.scope != rtnetlink.SCOPE_LINK:
                self._remove(old)
        for packed, prefix in addresses:
            if len(packed) == 4 or _has_ipv6():
                self._kernel.add_address(rtnetlink.Address(link.index, prefix, rtnetlink.SCOPE_UNIVERSE, packed))
        is_silent = bool(wanted.raw_flags & rtnetlink.IFF_NOARP)
        self._kernel.set_link(link.index, is_up=True, mtu=wanted.mtu, is_silent=is_silent)

    def _remove(self, address: rtnetlink.Address) -> None:
        try:
            self._kernel.remove_address(address)
        except OSError as err:
            if err.errno != errno.EADDRNOTAVAIL:  # a secondary address has gone with its primary one
                raise

    def _make_room(self, link: rtnetlink.Link, name: str) -> None:
        """Have another interface of this name give it up."""
        for other in self._kernel.links():
            if other.name == name:
                self._kernel.set_link(other.index, is_up=False)
                self._kernel.set_link(other.index, is_up=False, name=f"old{link.index}")

    def _index(self, name: str) -> int:
        for link in self._kernel.links():
            if link.name == name:
                return link.index
        raise RpcError(status.NOT_FOUND, f"Link not found (Name: {name})")


def _has_ipv6() -> bool:
    return read_text("/proc/sys/net/ipv6/conf/all/disable_ipv6").strip() == "0"


def _hardware(text: str) -> bytes:
    try:
        packed = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        packed = b""
    if len(packed) != _HARDWARE_SIZE:
        raise RpcError(status.INVALID_ARGUMENT, f"{text!r} is not a hardware address")
    return packed


def _packed(text: str) -> bytes:
    try:
        return _socket.inet_pton(_socket.AF_INET6 if ":" in text else _socket.AF_INET, text)
    except OSError as err:
        raise RpcError(status.INVALID_ARGUMENT, f"{text!r} is not an address") from err


def _prefix(address: messages.IPAddress) -> int:
    limit = 128 if ":" in address.address else 32
    if not address.mask.isdigit() or int(address.mask) > limit:
        raise RpcError(status.INVALID_ARGUMENT, f"{address.mask!r} is not a prefix length of {address.address}")
    return int(address.mask)


def _text(packed: bytes) -> str:
    family = _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6
    return _socket.inet_ntop(family, packed) if packed else ""


def _told(address: rtnetlink.Address) -> messages.IPAddress:
    family = messages.IPV4 if len(address.packed) == 4 else messages.IPV6
    return messages.IPAddress(family=family, address=_text(address.packed), mask=str(address.prefix))
