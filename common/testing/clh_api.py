"""Cloud Hypervisor's API as somebody else uses it, beside the VM manager: to do what the manager must then notice."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

_API_SOCKET = "api"


class _Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket, instead of to a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ClhApi:
    """The API of the VM in a directory."""

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/{_API_SOCKET}"

    def put(self, what: str, **body: object) -> str:
        """Ask for something; return why it was refused, or nothing."""
        status, said = self._request("PUT", what, body)
        return "" if status < 300 else str(said[-1])

    def get(self, what: str) -> Any:  # noqa: ANN401 - JSON
        """Ask a question; return the answer."""
        return self._request("GET", what, {})[1]

    def _request(self, method: str, what: str, body: dict[str, object]) -> tuple[int, Any]:
        connection = _Connection(self._path)
        try:
            text = json.dumps(body) if body else None
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, f"/api/v1/{what}", text, headers)
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(said) if said else None
