"""A container's hooks on the host: programs of its configuration, executed at points of its life.

What OCI defines for a container on the host means this for one in a VM, as with upstream (Kata Containers 4.1.0): the
hooks of ``prestart`` and ``createRuntime`` run when the VM runs and before the container is created, with the VMM's
pid, whose network namespace Docker's hook fills; ``poststart`` runs after the start, ``poststop`` when the container
is deleted. ``createContainer`` and ``startContainer`` belong into the container's namespaces, which the host has not.

A hook that fails before the start fails the creation; a later one is only logged
(https://github.com/opencontainers/runtime-spec/blob/main/runtime.md#lifecycle).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.protocols import oci

_OCI_VERSION = "1.0.2"
_MAX_WORDS = 2000
"""Characters of what a failed hook has printed last that its error repeats."""


class Hooks:
    """The hooks of one container, and what they are told of it."""

    def __init__(self, hooks: oci.Hooks, spec: oci.Spec, *, container_id: str, bundle: str, pid: int) -> None:
        self._hooks = hooks
        self._state = {
            "ociVersion": _OCI_VERSION,
            "id": container_id,
            "status": "",
            "pid": pid,
            "bundle": bundle,
            "annotations": spec.annotations,
        }

    async def prepare(self) -> None:
        """Execute what runs before the container is created.

        Raises:
            KataError: one failed; the others did not run.
        """
        for hook in (*self._hooks.prestart, *self._hooks.create_runtime):
            await _execute(hook, {**self._state, "status": "creating"})

    async def started(self) -> None:
        """Execute what runs after the start."""
        await self._try(self._hooks.poststart, "running")

    async def stopped(self) -> None:
        """Execute what runs when the container is deleted."""
        await self._try(self._hooks.poststop, "stopped")

    async def _try(self, hooks: Sequence[oci.Hook], status: str) -> None:
        for hook in hooks:
            try:
                await _execute(hook, {**self._state, "status": status})
            except KataError as err:
                log.get().warning("hook failed", error=str(err))


async def _execute(hook: oci.Hook, state: dict[str, object]) -> None:
    """Execute one hook with the state on its standard input."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *(hook.args or [hook.path]),
            executable=hook.path,
            env=dict(variable.partition("=")[::2] for variable in hook.env),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as err:
        raise KataError(f"hook {hook.path} cannot be executed: {err.strerror}") from err
    try:
        async with asyncio.timeout(hook.timeout or None):
            said, _ = await process.communicate(json.dumps(state).encode())
    except TimeoutError as err:
        raise KataError(f"hook {hook.path}: Hook timeout, it did not end within {hook.timeout} s") from err
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        words = said.decode(errors="replace").strip()[-_MAX_WORDS:]
        raise KataError(f"hook {hook.path} ended with status {process.returncode}: {words or 'it said nothing'}")
