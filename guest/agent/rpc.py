"""Calls: which method answers, and how an answer or an error reaches the caller.

A handler takes the request and the :class:`Call`. It returns the reply, or None if the answer comes later, from an
event, through :meth:`Call.reply` or :meth:`Call.fail`. What it cannot do it raises as :class:`RpcError`.
"""

from __future__ import annotations

from common import status
from common.protobuf import DecodeError, Message
from common.ttrpc.frames import Request, Response, Status
from guest.agent.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Handler = Callable[[Any, "Call"], Message | None]
    Methods = dict[str, tuple[type[Message], Handler]]


class RpcError(Exception):
    """What a caller is told: a code of ``common.status`` and a text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Call:
    """One call that waits for its answer; it takes exactly one."""

    def __init__(self, request: Request, answer: Callable[[Response], None]) -> None:
        self.method = request.method
        self.request_id = next((pair.value for pair in request.metadata if pair.key == "request-id"), "")
        self._answer = answer

    def reply(self, message: Message) -> None:
        """Answer."""
        self._answer(Response(payload=message.encode()))

    def fail(self, code: int, text: str) -> None:
        """Answer with an error, and log it with the request's id."""
        log("warning", "call failed", method=self.method, request=self.request_id, code=code, error=text)
        self._answer(Response(status=Status(code=code, message=text)))


class Router:
    """The services, by name, and their methods.

    Args:
        services: what is asked of every guest.
        rare: further methods of a service, made when one of them is first asked for: importing what they need would
            cost every boot.
    """

    def __init__(self, services: dict[str, Methods], rare: dict[str, Callable[[], Methods]] | None = None) -> None:
        self._services = services
        self._rare = rare or {}

    def handle(self, payload: bytes, answer: Callable[[Response], None]) -> None:
        """Take the payload of a request frame; ``answer`` is called once, now or later."""
        try:
            request = Request.decode(payload)
        except DecodeError as err:
            answer(Response(status=Status(code=status.INVALID_ARGUMENT, message=f"not a ttrpc request: {err}")))
            return
        call = Call(request, answer)
        try:
            kind, handler = self._find(request)
            reply = handler(kind.decode(request.payload), call)
        except RpcError as err:
            call.fail(err.code, err.text)
        except DecodeError as err:
            call.fail(status.INVALID_ARGUMENT, f"{request.method}: {err}")
        except Exception as err:  # noqa: BLE001  # one of the marked places: a bug answers INTERNAL and the agent lives
            call.fail(status.INTERNAL, f"{request.method}: {type(err).__name__}: {err}")
        else:
            if reply is not None:
                call.reply(reply)

    def _find(self, request: Request) -> tuple[type[Message], Handler]:
        methods = self._services.get(request.service)
        if methods is None:
            raise RpcError(status.UNIMPLEMENTED, f"service {request.service} is not known to this agent")
        if request.method not in methods and request.service in self._rare:
            methods |= self._rare.pop(request.service)()
        if request.method not in methods:
            raise RpcError(
                status.UNIMPLEMENTED, f"method {request.service}/{request.method} is not supported by this agent"
            )
        return methods[request.method]
