"""A socket device of a real QEMU on the kernel of a real host, which says whose an address is."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import HypervisorError
from common.services.vmm import VsockSpec
from common.testing.hotplug_stand import running
from common.testing.isolation import in_event_loop
from procs.vmm_manager.drivers.qemu.channel import VHOST_VSOCK, VHOST_VSOCK_SET_GUEST_CID

if TYPE_CHECKING:
    from collections.abc import Iterator

_CID = 4711
ROUNDS = 3


@in_event_loop
async def test_an_address_is_the_guests_as_long_as_it_has_the_device() -> None:
    async with running("qemu", {}) as (_, devices):
        for _ in range(ROUNDS):
            device = await devices.confirm(await devices.attach(spec=VsockSpec(cid=_CID)))
            with pytest.raises(OSError, match="Address already in use"), taken(_CID):
                pass
            assert await devices.devices() == {device.hypervisor_id: "attached"}
            await devices.detach(device)
            with taken(_CID):
                pass
        with taken(_CID), pytest.raises(HypervisorError, match="unable to set guest cid"):
            await devices.attach(spec=VsockSpec(cid=_CID))
        assert await devices.list() == ()


@contextmanager
def taken(cid: int) -> Iterator[None]:
    """Have an address ourselves.

    Raises:
        OSError: a guest has it.
    """
    fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        yield
    finally:
        os.close(fd)
