"""``kata-vmm-manager --hypervisor qemu``: run under supervisord, one per kind of hypervisor."""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys

from common.bus import service
from common.bus.events import Publisher
from common.bus.server import BusServer
from common.services.vmm import service_name
from common.workers import Workers
from procs.vmm_manager.drivers import DRIVERS, driver_of
from procs.vmm_manager.registry import Registry
from procs.vmm_manager.service import VmmService


def main() -> int:
    """Run until a signal; return the exit code."""
    parser = argparse.ArgumentParser(prog="kata-vmm-manager", description="Runs the VMs of pykata's sandboxes.")
    parser.add_argument("--hypervisor", choices=DRIVERS, default="qemu", help="which kind of VM (default: qemu)")
    parser.add_argument("--debug", action="store_true", help="log more")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a VM takes five descriptors; the usual limit is 1024

    async def serve() -> None:
        name = service_name(arguments.hypervisor)
        driver, publisher, workers = driver_of(arguments.hypervisor), Publisher(name), Workers()
        registry = Registry(driver, publisher, workers)
        server = BusServer(name, gauges=lambda: {"vms": float(len(registry.vms()))}, metrics=registry.metrics)
        is_recovered = asyncio.Event()
        VmmService(registry, is_recovered).register(server)
        async with server, publisher, workers:
            workers.spawn(driver.prepare())
            await registry.recover()
            is_recovered.set()
            await asyncio.Event().wait()

    return service.run("kata-vmm-manager", serve, is_debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
