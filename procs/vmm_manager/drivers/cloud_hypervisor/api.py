"""Asking one Cloud Hypervisor: bounded requests, its refusals as our errors.

A refusal is a list of strings, from the outermost to the root cause; versions before 47 and proxies say plain text. The
status tells little (500 for nearly everything), so a refusal is told by its root cause. Only "busy" is told by the
status, and means that nothing was done: it is asked again, at growing intervals since no event tells when it is over,
for as long as the request may take.

A request whose deadline passed may still take effect, and one whose connection broke may have: the caller asks what is
true. Nothing waits here for a guest: what does is told by an event.

Source: ``vmm/src/api/http`` of v51.1 and v53.0, and what v53.0 answered (docs/hypervisors/cloud-hypervisor.md).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from common.errors import (
    AlreadyExistsError,
    ExhaustedError,
    HypervisorError,
    KataError,
    NotFoundError,
    StateError,
    UnavailableError,
)
from common.text import readable
from procs.vmm_manager.drivers.cloud_hypervisor.requests import API_SOCKET
from procs.vmm_manager.drivers.http import Answer, UnixHttp, decoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMEOUT_S = 10.0
"""How long a running Cloud Hypervisor may take to answer."""

_MAX_REASON = 1000
_BUSY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""A removal of vCPUs is pending, or too many are connected: nothing was done, and it may be asked again."""
_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""What lies between two requests of which the first was answered with "busy"; the last for all further ones."""
_LEAST_S = 1.0
"""What an attempt must have left: one that were answered too late would leave open what it did."""

_CAUSES: tuple[tuple[str, type[KataError], str | None], ...] = (
    ("Failed to find device corresponding to the given identifier", NotFoundError, None),
    ("No device with id", NotFoundError, None),
    ("Could not find an available device slot", ExhaustedError, "a slot is free when the guest has let its device go"),
    ("is not unique", AlreadyExistsError, "a device's id is free when the guest has let the device go"),
    ("already locked", AlreadyExistsError, "another VM, or a device that is on its way out, has the file open"),
    ("lock for disk image", AlreadyExistsError, "another VM, or a device that is on its way out, has the file open"),
    ("VM is not created", StateError, None),
    ("VM is not running", StateError, None),
    ("VM is not booted", StateError, None),
    ("VM is already created", StateError, None),
    ("InvalidStateTransition", StateError, None),
    ("invalid VM state transition", StateError, None),
)
"""Part of a root cause, what it is to us, and what to do about it; the first that fits counts."""


class RefusalError(Exception):
    """Cloud Hypervisor answered, and did not do it. What it is to a caller of ours is :attr:`meaning`."""

    def __init__(self, meaning: KataError) -> None:
        super().__init__(str(meaning))
        self.meaning = meaning


class Api:
    """The API of one Cloud Hypervisor; requests follow one another."""

    def __init__(self, directory: str) -> None:
        self._http = UnixHttp(directory, API_SOCKET, "Cloud Hypervisor")

    async def get(self, what: str) -> Any:  # noqa: ANN401 - JSON of Cloud Hypervisor's choosing
        """Ask a question, for example ``vm.info``. Raises as :meth:`put` does."""
        return await self._request("GET", what, None, TIMEOUT_S)

    async def put(
        self,
        what: str,
        body: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = TIMEOUT_S,
        is_patient: bool = True,
    ) -> Any:  # noqa: ANN401 - the same
        """Have something done, for example ``vm.boot``, with these descriptors, and return what is answered.

        Who is not patient takes the first "busy" for an answer.

        Raises:
            NotFoundError, ExhaustedError, AlreadyExistsError, StateError, HypervisorError: it was refused; the cause of
                the error is a :class:`RefusalError`.
            UnavailableError: it was not done, and may be asked again.
            DeadlineError, HypervisorError: there was no answer; what was done must be asked.
        """
        return await self._request("PUT", what, body, timeout_s, fds, _PAUSES_S if is_patient else ())

    async def ping(self, *, timeout_s: float) -> str:
        """Wait until it answers; return its version. Raises as :meth:`put` does."""
        answer = await self._request("GET", "vmm.ping", None, timeout_s)
        if not isinstance(answer, dict) or "version" not in answer:
            raise HypervisorError(f"what listens is no Cloud Hypervisor: it says {readable(str(answer))[:100]}")
        return str(answer["version"])

    async def settle(self) -> None:
        """Wait until what it has begun with devices is done.

        An eject tells of itself, and leaves the device tree, before it closes the device's file, all of it under the
        device manager's lock. Counting needs that lock, and changes nothing.
        """
        await self.get("vm.counters")

    async def _request(
        self,
        method: str,
        what: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        fds: Sequence[int] = (),
        pauses_s: Sequence[float] = _PAUSES_S,
    ) -> Any:  # noqa: ANN401
        answer = await self._answer(method, f"/api/v1/{what}", body, timeout_s, fds, pauses_s)
        said = decoded(answer)
        if 200 <= answer.status < 300:
            return said
        meaning = meaning_of(answer.status, said, what)
        raise meaning from RefusalError(meaning)

    async def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        fds: Sequence[int],
        pauses_s: Sequence[float],
    ) -> Answer:
        """Return an answer other than "busy", or the last one that there was time for."""
        clock = asyncio.get_running_loop().time
        end = clock() + timeout_s
        answer = await self._http.request(method, path, body, timeout_s=timeout_s, fds=fds)
        for pause_s in chain(pauses_s, *map(repeat, pauses_s[-1:])):
            if answer.status not in _BUSY:
                break
            await asyncio.sleep(pause_s)
            if (left_s := end - clock()) < _LEAST_S:
                break
            answer = await self._http.request(method, path, body, timeout_s=left_s, fds=fds)
        return answer


def meaning_of(status: int, said: object, what: str) -> KataError:
    """Return a refusal as an error of ours.

    Args:
        status: of the answer.
        said: its body, decoded: a list of strings, or text.
        what: what was asked for.
    """
    reasons = [str(reason) for reason in said] if isinstance(said, list) else [str(said or "no reason is given")]
    text = readable(": ".join(reasons[1:] or reasons))[-_MAX_REASON:]
    message = f"Cloud Hypervisor refused {what}: {text}"
    if status in _BUSY:
        return UnavailableError(message, hint="it is busy; ask again")
    for part, kind, hint in _CAUSES:
        if any(part in reason for reason in reasons):
            return kind(message, hint=hint)
    return HypervisorError(message)


def is_refusal(error: BaseException) -> bool:
    """Return whether an error is an answer, so that what was asked for has been dealt with."""
    return isinstance(error.__cause__, RefusalError)
