"""Background tasks that live as long as a block.

``asyncio.TaskGroup`` waits for its tasks and wraps what its block raises. A component whose tasks run until it is
closed wants the opposite: leaving the block ends them, and the block's own error passes through as it is. A task that
fails still ends the block, with its error in an ExceptionGroup.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

T = TypeVar("T")


class Workers:
    """An async context manager that owns tasks; to be left by the task that entered it."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine until it ends or the block does."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        # The group needs to see a cancellation, which may be its own doing, and must not see the block's error.
        is_cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        await (self._group.__aexit__(kind, error, trace) if is_cancelled else self._group.__aexit__(None, None, None))
