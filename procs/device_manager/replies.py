"""Answers that outlive this process: a caller that asks again after our restart, by call id, gets what it was told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import log
from common.bus.memory import REMEMBER_S, Memory
from common.services import device as contract

if TYPE_CHECKING:
    from common.bus.wire import Call
    from procs.device_manager.journal import Journal

_KEPT = frozenset(verb.name for verb in (contract.ATTACH, contract.CONFIRM, contract.ABORT, contract.DETACH))
"""What changes something; the answer to any other call may as well be found anew."""


class Replies(Memory):
    """Replies in this process, and those that must last in the journal as well."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def recall(self, call_id: str) -> bytes | None:
        """Return the answer that a call was given, by us or by our predecessor, or None."""
        return super().recall(call_id) or self._journal.recall(call_id)

    def remember(self, call: Call, reply: bytes) -> None:
        """Keep the answer to a call; in this process alone, if there is no room for it in the journal."""
        super().remember(call, reply)
        if call.verb in _KEPT:
            try:
                self._journal.remember(call.call_id, reply, seconds=REMEMBER_S)
            except OSError as err:
                log.get().error("an answer will not outlive this process", request=call.request_id, error=str(err))
