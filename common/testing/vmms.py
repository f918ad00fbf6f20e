"""Hypervisors as a test uses them, all in the same way, with what differs between them as data."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from common.config import BlockDriver
from common.testing.device_stand import REMOVAL_TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path

    from common.services.vmm import Vm
    from common.testing.demands import How


class Vmm(ABC):
    """What a test has of any hypervisor, fake or real.

    Attributes:
        hypervisor: its name.
        config: changes to a configuration that works.
        bus: where it plugs.
        removal_timeout_s: how long its guest may take to let a device go.
        driver: how its guest drives disks.
        rounds: how often a disk comes and goes in a row.
        waits_for_guest: whether a device goes when the guest lets it go, and not when that is asked for.
    """

    hypervisor: ClassVar[str]
    config: ClassVar[dict[str, object]] = {}
    bus: ClassVar[str]
    removal_timeout_s: ClassVar[float]
    driver: ClassVar[BlockDriver] = BlockDriver.VIRTIO_BLK
    rounds: ClassVar[int] = 20
    waits_for_guest: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def install(cls, directory: Path, *arguments: str) -> str:
        """Put the program into the run directory of a test, to be started with these arguments; return its path."""

    @abstractmethod
    async def connect(self, vm: Vm) -> None:
        """Get hold of a VM, and wait until its guest can be asked to let devices go."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of it."""

    @abstractmethod
    async def guest_lets_go(self, *, does: bool) -> None:
        """Say whether the guest lets devices go by itself."""

    @abstractmethod
    async def let_go(self, hypervisor_id: str) -> None:
        """Have the guest let a device go that it was asked for; of a fake, also one that it was not."""

    @abstractmethod
    async def has(self) -> tuple[set[str], set[str]]:
        """Return the devices' ids, and the names of the files that are open."""


class FakeVmm(Vmm):
    """What a test demands of a fake hypervisor besides.

    Attributes:
        module: the program.
        arguments: what it is started with before all else.
        adds: the commands that plug a disk, in order.
        removes: the command that asks for a removal.
        tells: the event that confirms one.
    """

    module: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[tuple[str, ...]]
    removes: ClassVar[str]
    tells: ClassVar[str]
    removal_timeout_s = REMOVAL_TIMEOUT_S

    @classmethod
    def install(cls, directory: Path, *arguments: str) -> str:
        """See :class:`Vmm`."""
        program = directory / cls.hypervisor
        command = " ".join([sys.executable, "-P", "-m", cls.module, *cls.arguments, *arguments])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o700)
        return str(program)

    @abstractmethod
    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """Have the next answers to a command, or the next events of a name, go wrong."""

    @abstractmethod
    async def transcript(self) -> list[str]:
        """Return what was said so far."""
