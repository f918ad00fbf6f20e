"""The request for the VM, made with as little imported as that takes.

What is imported decides when the VM starts: asyncio and all that stands on it come while the manager and then the guest
are at work. There the request is made again, where its answer can be waited for (:mod:`common.bus.early`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from common import config as configuration
from common.bus.early import EarlyCall
from common.errors import UsageError
from common.protobuf import DecodeError
from common.protocols.task import Any, RuntimeOptions
from common.services import vmm

if TYPE_CHECKING:
    from common.config import HypervisorConfig
    from procs.shim.launch import Launch


class Order:
    """A VM that was asked for.

    Attributes:
        config: the configuration that it was asked for with.
        service: the VM manager that was asked.
        functions: devices of the host that the guest boots with.
        wish: the request.
        early: the request on its way.

    Raises:
        UsageError: there is no configuration that can be used; nothing was asked.
        NotFoundError, UnsupportedError: the container is given a device of the host that its guest cannot have.
    """

    def __init__(self, launch: Launch) -> None:
        self.config = configuration.load(configuration.find(_wanted_config(launch.options)))
        section = self.config.hypervisor
        self.functions = _functions(section, launch.bundle) if section.is_vfio_cold else ()
        self.wish = vmm.CreateVm(
            sandbox_id=launch.sandbox_id,
            config=section.with_root_ports(len(self.functions)),
            is_held=bool(self.functions),
        )
        self.service = vmm.service_name(section.name)
        self.early = EarlyCall(self.service, vmm.CREATE_VM, self.wish, timeout_s=vmm.CREATE_TIMEOUT_S)


def _functions(section: HypervisorConfig, bundle: str) -> tuple[vmm.VfioSpec, ...]:
    """Return the devices of the host that a container is given: its configuration is there before its Create."""
    from procs.shim.bundle import read_groups

    found = (function for group in read_groups(bundle, section) for function in group.functions)
    return tuple(dict.fromkeys(found))


def _wanted_config(options: bytes) -> str:
    """Return the configuration file that the runtime's options name, if they are ours, or else the environment."""
    try:
        wrapped = Any.decode(options)
        if wrapped.type_url == RuntimeOptions.TYPE_URL:
            wanted = RuntimeOptions.decode(wrapped.value).config_path
            if wanted:
                return wanted
    except DecodeError as err:
        raise UsageError(f"runtime options on standard input are malformed: {err}") from err
    return os.environ.get("KATA_CONF_FILE", "")
