"""The errors of pykata: few, semantic, each with one status code on every wire.

A message is lower case without a full stop and names the object and the value; ``hint`` says what to do next. An
error keeps its class, hint and context across the bus (:meth:`KataError.to_wire`, :func:`from_wire`).
"""

from __future__ import annotations

from typing import ClassVar, Self

from common import status


class KataError(Exception):
    """Root of all errors that a caller may see.

    Attributes:
        code: gRPC status code (``common.status``).
        hint: what the reader can do about it, or None.
        context: what the error is about, for logs: names and values.
    """

    code: ClassVar[int] = status.UNKNOWN

    def __init__(self, message: str, *, hint: str | None = None, **context: str) -> None:
        super().__init__(message)
        self.hint = hint
        self.context = context

    @property
    def message(self) -> str:
        """The text without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def copy(self) -> Self:
        """Return an error that says the same: one that is raised to several would bear the traceback of all of them."""
        return type(self)(self.message, hint=self.hint, **self.context)

    def to_wire(self) -> dict[str, object]:
        """Return the error as the body of a bus reply."""
        return {
            "kind": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "context": self.context,
        }


class UsageError(KataError):
    """The caller's request or configuration is wrong."""

    code = status.INVALID_ARGUMENT


class NotFoundError(KataError):
    """What the caller named does not exist."""

    code = status.NOT_FOUND


class AlreadyExistsError(KataError):
    """What the caller wants to create exists."""

    code = status.ALREADY_EXISTS


class StateError(KataError):
    """The object exists but is in a state that does not allow the request."""

    code = status.FAILED_PRECONDITION


class ExhaustedError(KataError):
    """No slot, port or queue place is left."""

    code = status.RESOURCE_EXHAUSTED


class UnsupportedError(KataError):
    """This hypervisor, guest or version cannot do it."""

    code = status.UNIMPLEMENTED


class UnavailableError(KataError):
    """A peer is down or does not answer; nothing is known to have been done."""

    code = status.UNAVAILABLE


class DeadlineError(KataError):
    """The caller's deadline passed."""

    code = status.DEADLINE_EXCEEDED


class InterruptedCallError(KataError):
    """The reply was lost: whether the call took effect is unknown, ask the peer."""

    code = status.UNKNOWN


class WireError(KataError):
    """Malformed bytes, or a version of the protocol that we do not speak."""

    code = status.DATA_LOSS


class HypervisorError(KataError):
    """The hypervisor refused or failed."""

    code = status.INTERNAL


class GuestError(KataError):
    """The guest or its agent failed."""

    code = status.INTERNAL


class BugError(KataError):
    """One of our own invariants broke."""

    code = status.INTERNAL


_KINDS = {
    kind.__name__: kind
    for kind in (
        UsageError, NotFoundError, AlreadyExistsError, StateError, ExhaustedError, UnsupportedError,
        UnavailableError, DeadlineError, InterruptedCallError, WireError, HypervisorError, GuestError, BugError,
    )
}  # fmt: skip


def from_wire(kind: str, message: str, hint: str | None, context: dict[str, str]) -> KataError:
    """Rebuild the error that a peer sent; an unknown kind becomes :class:`KataError`."""
    return _KINDS.get(kind, KataError)(message, hint=hint, **context)
