"""runc's shim in the place of ours: what it answers is what clients are used to."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.protocols import task
from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.shim_stand import ShimStand, kill

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from common.ttrpc.client import TtrpcClient


class RuncStand(ShimStand):
    """A stand whose shim runs containers with runc on this host; the fakes of our services are not asked."""

    PROGRAM = Path("/usr/bin/containerd-shim-runc-v2")

    _shim = 0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.bundle = root / self.id  # as containerd names it; the shim's ``delete`` relies on that

    async def run(self, action: str, *, options: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Execute the shim's program; it has no options."""
        return await super().run(action, options=options or b"")

    async def start(self) -> TtrpcClient:
        """Start the shim and connect to it."""
        client = await super().start()
        asked = task.IdRequest(id=self.id)
        self._shim = (await self.call(client, "Connect", asked, task.ConnectResponse)).shim_pid
        return client

    async def delete(self) -> subprocess.CompletedProcess[bytes]:
        """Execute the ``delete`` action, and end the shim, which that action takes for dead."""
        done = await super().delete()
        if self._shim:
            await kill(self._shim)
            self.socket_path.unlink(missing_ok=True)
        return done

    async def hold(self, verb: str) -> Callable[[], object]:
        """Have the next Create wait in a hook, or the next Start for a container that is stopped."""
        if verb == "Create":
            return self._hold_in_hook()
        pid = await self._task_pid()
        os.kill(pid, signal.SIGSTOP)
        return lambda: os.kill(pid, signal.SIGCONT)

    def _hold_in_hook(self) -> Callable[[], object]:
        gate = self.fifo("gate")
        config = json.loads((self.bundle / "config.json").read_text())
        config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", f"read go < {gate}"]}]}
        (self.bundle / "config.json").write_text(json.dumps(config))
        return lambda: Path(gate).write_text("go\n")  # waits for the hook to be there

    async def end_from_outside(self) -> None:
        """Kill the container's process."""
        os.kill(await self._task_pid(), signal.SIGKILL)

    async def _task_pid(self) -> int:
        named = task.IdRequest(id=self.id)
        return (await self.call(await self.connect(), "Connect", named, task.ConnectResponse)).task_pid

    def spec(self) -> dict[str, Any]:
        """Return what a container of runc needs."""
        make_busybox_rootfs(self.rootfs)
        return {
            **super().spec(),
            "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": f"/{self.id}",
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            },
        }
