"""Memory that a guest plugs by virtio-mem, as its hypervisor wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.protocols.agent import Empty
from common.protocols.guest import Metrics, OnlineCPUMemRequest
from common.testing.guest_vm import GuestVm

if TYPE_CHECKING:
    from common.testing.agent_client import AgentClient
    from guest.image import Image

MIB = 1 << 20
DEVICES = (
    *("-m", "maxmem=2G", "-object", "memory-backend-memfd,id=more,size=256M,share=on"),
    *("-device", "virtio-mem-pci,id=more0,memdev=more,requested-size=128M"),
)

ASKS = 100
"""Once is enough as a rule: the guest enters memory when it has told QEMU, and its agent is asked after that."""


def total(agent: AgentClient) -> int:
    text = agent.ask("GetMetrics", Empty(), Metrics).metrics
    (line,) = [line for line in text.splitlines() if line.startswith('kata_guest_meminfo{item="mem_total"}')]
    return int(line.rsplit(" ", 1)[1])


def test_what_is_wanted_at_the_boot_is_plugged_and_taken_into_use_when_the_agent_is_told(image: Image) -> None:
    with GuestVm(image.vmlinux, image.initrd, devices=DEVICES) as vm:
        vm.wait_told("MEMORY_DEVICE_SIZE_CHANGE")
        with vm.connect() as agent:
            at_boot = total(agent)
            for _ in range(ASKS):
                agent.ask("OnlineCPUMem", OnlineCPUMemRequest(), Empty)
                if total(agent) > at_boot + 100 * MIB:
                    return
    pytest.fail("memory that is plugged is not used")
