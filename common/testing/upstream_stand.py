"""Our shim with a guest whose agent is another's: a real QEMU with a vsock device, between the fakes of a stand.

The agent has to be in the initrd, with the kernel's modules loaded.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common import paths
from common.linux import cgroup, identity
from common.processes import ProcessIdentity
from common.services import vmm
from common.services.channel import HybridVsock
from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.guest_vm import GuestVm
from common.testing.shim_peers import FakeDeviceManager, FakeVmManager
from common.testing.shim_stand import ShimStand

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from common.services import device

_PARAMETERS = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all agent.log=debug"


class RealVms(FakeVmManager):
    """Gives the shim a VM with upstream's agent."""

    images: tuple[Path, Path]

    def __init__(self, group: AsyncExitStack) -> None:
        super().__init__(group)
        self.running = ExitStack()
        self.vm: GuestVm | None = None

    async def _create(self, request: vmm.CreateVm) -> vmm.Vm:
        self.vm = GuestVm(*self.images, has_vsock=True, parameters=_PARAMETERS)
        await asyncio.to_thread(self.running.enter_context, self.vm)
        assert self.vm.vsock is not None
        directory = paths.vm_dir(request.sandbox_id)
        await asyncio.to_thread(Path(directory).mkdir)
        Path(cgroup.create(request.sandbox_id))
        pid = self.vm.pid
        self._vm = vmm.Vm(
            sandbox_id=request.sandbox_id,
            hypervisor="qemu",
            version="0",
            accelerator="tcg",
            process=ProcessIdentity(pid=pid, start_time=identity.start_time(pid), boot_id=identity.boot_id()),
            channel=HybridVsock(socket=str(self.vm.vsock.path)),
            console_log=str(self.vm.path("console")),
            hotplug_buses=(vmm.HotplugBus(name="bus0", kind=vmm.BusKind.PCI, slots=1),),
        )
        self.has_vm.set()
        return self._vm

    async def end_vm(self) -> None:
        """Kill QEMU."""
        await asyncio.to_thread(self.running.close)

    async def _describe(self, _request: vmm.SandboxRef) -> vmm.VmStatus:
        assert self._vm is not None
        assert self.vm is not None
        return vmm.VmStatus(
            vm=self._vm, is_running=True, runstate="running", console_tail=self.vm.console()[-4000:], log_tail=""
        )


class RealDevices(FakeDeviceManager):
    """Plugs the sandbox's share, and one disk."""

    vms: RealVms

    async def _attach(self, request: device.Attach) -> device.Device:
        assert self.vms.vm is not None
        plugged = await super()._attach(request)
        if isinstance(request.spec, vmm.ShareSpec):
            self.vms.vm.share = Path(request.spec.source)
            await asyncio.to_thread(self.vms.vm.plug_share)
            return plugged
        await asyncio.to_thread(self.vms.vm.plug_disk, Path(request.spec.source), plugged.serial)
        return msgspec.structs.replace(plugged, guest_path="05/01")


class UpstreamStand(ShimStand):
    """A shim whose guest is upstream's."""

    def __init__(self, root: Path, images: tuple[Path, Path]) -> None:
        super().__init__(root)
        vms = RealVms(self._stack)
        vms.images = images
        self.vms = vms
        devices = RealDevices()
        devices.vms = vms
        self.devices = devices
        make_busybox_rootfs(self.rootfs)

    def spec(self) -> dict[str, Any]:
        """Return what containerd's default specification has and upstream's agent needs."""
        capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT"]
        sets = ("bounding", "effective", "permitted")
        return {
            "ociVersion": "1.0.2",
            "process": {
                "args": ["true"],
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": dict.fromkeys(sets, capabilities),
                "noNewPrivileges": True,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            ],
            "linux": {
                "cgroupsPath": "/test/upstream",
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
                "resources": {"memory": {"limit": 64 << 20}},
            },
        }
