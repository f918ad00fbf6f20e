"""The file system of the run directory is full: who wants a device is told, and nothing is lost."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import KataError
from common.linux import mounts
from common.testing.fake_vmms import FAKES, Fake
from common.testing.hotplug_stand import plugging_here
from common.testing.isolation import in_event_loop, run_dir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_run_dir() -> Iterator[Path]:
    """A run directory that is a file system of its own."""
    with run_dir() as directory:
        mounts.mount("tmpfs", str(directory), "tmpfs", data="size=16m")
        try:
            yield directory
        finally:
            mounts.unmount_below(str(directory))


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """No room at all there."""
    file = directory / "all-the-room"
    with file.open("wb") as filler:
        room = os.fstatvfs(filler.fileno())
        os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize)
    yield
    file.unlink()


@pytest.mark.parametrize("kind", FAKES.values(), ids=FAKES)
@in_event_loop
async def test_devices_come_and_go_again_when_there_is_room(kind: type[Fake]) -> None:
    with small_run_dir() as directory:
        async with plugging_here(kind) as stand:
            held = await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a")))
            wanted = stand.disk("b")
            with full(directory):
                for _ in range(2):
                    with pytest.raises(KataError, match="full") as refused:
                        await stand.devices.attach(spec=wanted)
                    assert refused.value.hint == "make room on the file system of the run directory"
                with pytest.raises(KataError, match="cannot be asked to detach: the journal cannot be written"):
                    await stand.devices.detach(held)
                assert await stand.devices.devices() == {held.hypervisor_id: "attached"}
                assert await stand.vmm.has() == ({held.hypervisor_id}, {"a"})
            await stand.devices.detach(held)
            again = await stand.devices.attach(spec=wanted)
            assert await stand.devices.devices() == {again.hypervisor_id: "plugged"}
            assert await stand.vmm.has() == ({again.hypervisor_id}, {"b"})
