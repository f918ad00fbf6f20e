"""Firecracker's REST API: requests in, errors by what they mean.

A success is 204 without a body or, of a GET, 200 with one; a failure is 400 with ``{"fault_message": "..."}``
(src/firecracker/swagger/firecracker.yaml). What a message means is known by its words, since the status never tells.
"""

from __future__ import annotations

from typing import Any

from common.errors import AlreadyExistsError, HypervisorError, KataError, NotFoundError, UnsupportedError
from procs.vmm_manager.drivers.http import UnixHttp, decoded

SOCKET = "api"
REQUEST_TIMEOUT_S = 10.0
"""How long an answer may take."""
_SUCCESS = frozenset((200, 204))

_MEANINGS: tuple[tuple[str, type[KataError]], ...] = (
    ("Device not found", NotFoundError),
    ("DeviceNotFound", NotFoundError),
    ("Device ID in use", AlreadyExistsError),
    ("PCI is not enabled", UnsupportedError),
)
"""``VmmActionError`` in src/vmm/src/rpc_interface.rs; what is not here is Firecracker's refusal and nothing more."""


class Api:
    """The API of one VM, of which we are the only user.

    Args:
        directory: where its socket is.
    """

    def __init__(self, directory: str) -> None:
        self._http = UnixHttp(directory, SOCKET, "Firecracker")

    async def get(self, path: str) -> dict[str, Any]:
        """Return a resource.

        Raises:
            HypervisorError: what came is none.
        """
        body = await self._request("GET", path)
        if not isinstance(body, dict):
            raise HypervisorError(f"Firecracker answered GET {path} with something that is no object")
        return body

    async def put(self, path: str, body: dict[str, object], *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Create a resource or set it as a whole."""
        await self._request("PUT", path, body, timeout_s)

    async def patch(self, path: str, body: dict[str, object]) -> None:
        """Change a resource."""
        await self._request("PATCH", path, body)

    async def delete(self, path: str) -> None:
        """Remove a resource."""
        await self._request("DELETE", path)

    async def _request(self, method: str, path: str, body: object = None, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:  # noqa: ANN401 - JSON
        answer = await self._http.request(method, path, body, timeout_s=timeout_s)
        content = decoded(answer)
        if answer.status in _SUCCESS:
            return content
        said = content.get("fault_message") if isinstance(content, dict) else content
        raise refusal(f"{method} {path}", str(said or f"status {answer.status}"))


def refusal(request: str, said: str) -> KataError:
    """Return the error that a failure's message means."""
    kind = next((kind for words, kind in _MEANINGS if words in said), HypervisorError)
    return kind(f"Firecracker refused {request}: {said}")
