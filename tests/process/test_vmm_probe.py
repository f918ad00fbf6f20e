"""Whether KVM works, asked of programs that behave as QEMU does on good and bad hosts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from common import paths
from common.config import QemuConfig
from common.linux import identity
from procs.vmm_manager.drivers import probe
from procs.vmm_manager.drivers.qemu.cmdline import probe_argv

if TYPE_CHECKING:
    from collections.abc import Callable

BOOTS = 'echo "Linux version 6"; echo "Kernel panic: Unable to mount root fs"; exec sleep 1000'
ABORTS = 'echo "error: failed to set MSR 0x10a" >&2; exit 134'
HANGS = 'echo "Linux version 6"; exec sleep 1000'
IS_MUTE = "exec sleep 1000"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], QemuConfig]:
    """A host with a /dev/kvm, on which QEMU is a script that counts how often it runs."""
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(probe, "KVM", Path("/dev/null"))
    monkeypatch.setattr(probe, "SILENCE_S", 0.5)

    def with_qemu(script: str) -> QemuConfig:
        qemu = tmp_path / "qemu"
        qemu.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/runs\n{script}\n')
        qemu.chmod(0o755)
        return QemuConfig(path=str(qemu), kernel=str(qemu))

    return with_qemu


def runs() -> list[str]:
    file = Path(paths.run_dir()) / "runs"
    return file.read_text().splitlines() if file.exists() else []


def verdict() -> dict[str, str]:
    found: dict[str, str] = json.loads((Path(paths.run_dir()) / "probe.json").read_text())
    return found


def accelerator(config: QemuConfig) -> str:
    return asyncio.run(probe.Probe(probe_argv).verdict(config)).accelerator


@pytest.mark.parametrize(
    ("script", "chosen", "reason"),
    [
        (BOOTS, "kvm", "the guest's kernel booted"),
        (ABORTS, "tcg", "qemu gave up under KVM: error: failed to set MSR 0x10a"),
        (HANGS, "tcg", "a guest hung under KVM after: Linux version 6"),
        (IS_MUTE, "tcg", "a guest hung under KVM after: nothing at all"),
    ],
)
def test_only_a_kernel_that_boots_speaks_for_kvm(
    host: Callable[[str], QemuConfig], script: str, chosen: str, reason: str
) -> None:
    assert accelerator(host(script)) == chosen
    assert verdict() == {"boot_id": identity.boot_id(), "accelerator": chosen, "reason": reason}
    assert "accel=kvm" in runs()[0]


def test_the_verdict_holds_for_one_boot(host: Callable[[str], QemuConfig]) -> None:
    assert accelerator(host(BOOTS)) == "kvm"
    assert accelerator(host(ABORTS)) == "kvm", "remembered by another manager"
    assert len(runs()) == 1
    (Path(paths.run_dir()) / "probe.json").write_text('{"boot_id": "b", "accelerator": "kvm", "reason": "r"}')
    assert accelerator(host(ABORTS)) == "tcg", "that was another boot"
    assert len(runs()) == 2


def test_many_who_ask_at_once_are_answered_by_one_boot(host: Callable[[str], QemuConfig]) -> None:
    async def ask() -> list[str]:
        asked = probe.Probe(probe_argv)
        verdicts = await asyncio.gather(*(asked.verdict(host(BOOTS)) for _ in range(3)))
        return [verdict.accelerator for verdict in verdicts]

    assert asyncio.run(ask()) == ["kvm"] * 3
    assert len(runs()) == 1


def test_without_kvm_nothing_is_booted(host: Callable[[str], QemuConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "KVM", Path("/no/such/device"))
    assert accelerator(host(BOOTS)) == "tcg"
    assert runs() == []
    assert verdict()["reason"] == "there is no /no/such/device"


@pytest.mark.parametrize("missing", ["path", "kernel"])
def test_kvm_is_not_judged_by_what_cannot_boot_at_all(host: Callable[[str], QemuConfig], missing: str) -> None:
    config = msgspec.structs.replace(host(BOOTS), **{missing: "/no/such/file"})
    assert accelerator(config) == "tcg"
    assert accelerator(host(BOOTS)) == "kvm", "nothing was remembered"
