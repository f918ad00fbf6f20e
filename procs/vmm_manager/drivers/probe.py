"""Whether KVM works here, found out by booting something.

``/dev/kvm`` may open, create VMs and vCPUs, run a few instructions, and still be useless: there are hosts on which
stock kernels hang. So the probe boots the guest's own kernel without a root file system and waits for the panic at the
end of its boot; it fails if the VMM gives up or the console stays silent for :data:`SILENCE_S`. The verdict holds for
one boot of the host and is kept in ``probe.json``, for the managers of all hypervisors. Without KVM QEMU runs a VM in
software emulation (TCG): slow, and supported; the other hypervisors run none.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common import config as configuration
from common import log, paths
from common.errors import UsageError
from common.linux import identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.config import HypervisorSection

SILENCE_S = float(os.environ.get("PYKATA_PROBE_SILENCE_S") or 5)
"""A host that is itself emulated takes longer for everything, and says so in its environment."""
KVM = Path("/dev/kvm")

_REACHED_THE_END = b"Unable to mount root fs"
KERNEL_PARAMETERS = "console=ttyS0 earlyprintk=ttyS0 panic=-1"
_KEPT = 8192


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe found.

    Attributes:
        boot_id: the host's boot that it holds for.
        accelerator: ``kvm`` or ``tcg``.
        reason: why, for people.
    """

    boot_id: str
    accelerator: str
    reason: str


class Probe:
    """Finds the verdict once, however many ask.

    Args:
        argv: the command that boots a configuration's kernel under KVM, with :data:`KERNEL_PARAMETERS` and its first
            serial port on standard output.
    """

    def __init__(self, argv: Callable[[Any], list[str]]) -> None:
        self._argv = argv
        self._lock = asyncio.Lock()
        self._verdict: Verdict | None = None

    async def prepare(self, section: type[HypervisorSection]) -> None:
        """Find out with the host's configuration; if that is of another section, the first VM's is waited for."""
        with suppress(UsageError):
            config = configuration.load(configuration.find(os.environ.get("KATA_CONF_FILE", ""))).hypervisor
            if isinstance(config, section):
                await self.verdict(config)

    async def verdict(self, config: HypervisorSection) -> Verdict:
        """Return what is true of this host. What cannot boot at all says nothing about KVM: it will fail by itself."""
        if not all(Path(file).is_file() for file in (config.path, config.kernel)):
            return Verdict(boot_id="", accelerator="tcg", reason="there is nothing to boot")
        async with self._lock:
            if self._verdict is None:
                self._verdict = _remembered() or await _find(self._argv(config))
                log.get().info("accelerator", accelerator=self._verdict.accelerator, reason=self._verdict.reason)
        return self._verdict


def _file() -> Path:
    return Path(paths.run_dir()) / "probe.json"


def _remembered() -> Verdict | None:
    try:
        verdict = msgspec.json.decode(_file().read_bytes(), type=Verdict)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return verdict if verdict.boot_id == identity.boot_id() else None


async def _find(argv: list[str]) -> Verdict:
    reason = await _boot_under_kvm(argv) if KVM.exists() else f"there is no {KVM}"
    verdict = Verdict(
        boot_id=identity.boot_id(),
        accelerator="tcg" if reason else "kvm",
        reason=reason or "the guest's kernel booted",
    )
    _file().write_bytes(msgspec.json.encode(verdict))
    return verdict


async def _boot_under_kvm(argv: list[str]) -> str:
    """Boot the kernel to its end; return why that failed, or nothing."""
    vmm = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL"),  # alone among our children it must not outlive us
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert vmm.stdout is not None
    seen = b""
    try:
        while _REACHED_THE_END not in seen:
            async with asyncio.timeout(SILENCE_S):
                chunk = await vmm.stdout.read(_KEPT)
            if not chunk:
                return f"{Path(argv[0]).name} gave up under KVM: {_last_line(seen)}"
            seen = (seen + chunk)[-_KEPT:]
    except TimeoutError:
        return f"a guest hung under KVM after: {_last_line(seen) or 'nothing at all'}"
    finally:
        if vmm.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(vmm.pid, signal.SIGKILL)  # vmm.kill() could reap it, which asyncio's watcher then misses
        await vmm.wait()
    return ""


def _last_line(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1].strip()
