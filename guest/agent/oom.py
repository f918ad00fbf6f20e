"""Containers that ran out of memory, and the host that wants to know (``GetOOMEvent``).

The host always has one call open. What happens while it has none is kept: once per container, so it is bounded.
"""

from __future__ import annotations

from common import status
from common.protocols.agent import OomEvent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Call


class OomEvents:
    """Brings containers that ran out of memory and the call that asks for them together."""

    def __init__(self) -> None:
        self._containers: dict[str, None] = {}
        self._call: Call | None = None

    def report(self, container_id: str) -> None:
        """Tell the host, now or when it asks."""
        self._containers[container_id] = None
        self._tell()

    def wait(self, call: Call) -> None:
        """Answer with the next container. The host that asks again has a new conversation: its older call is ended."""
        if self._call is not None:
            self._call.fail(status.ABORTED, "another call waits for the next container")
        self._call = call
        self._tell()

    def forget(self, container_id: str) -> None:
        """Tell no more of a container: it is removed, and its id may be used again."""
        self._containers.pop(container_id, None)

    def _tell(self) -> None:
        if self._call is not None and self._containers:
            container_id = next(iter(self._containers))
            del self._containers[container_id]
            call, self._call = self._call, None
            call.reply(OomEvent(container_id=container_id))
