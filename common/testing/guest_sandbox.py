"""A guest with a sandbox in it, ready for containers, driven as the shim drives it but without a shim.

::

    with GuestSandbox(vmlinux, initrd) as sandbox:
        task = sandbox.run("sh", "-c", "exit 3")
        assert task.wait() == 3
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from common import paths
from common.channel import NO_STREAM
from common.protocols import oci
from common.protocols.agent import (
    AGENT_SERVICE,
    SHARE_MOUNT_POINT,
    SHARE_TAG,
    ContainerRequest,
    CreateContainerRequest,
    CreateSandboxRequest,
    Device,
    Empty,
    ExecProcessRequest,
    RemoveContainerRequest,
    SignalProcessRequest,
    Storage,
    WaitProcessRequest,
    WaitProcessResponse,
)
from common.testing.agent_client import AgentError
from common.testing.guest_vm import GuestVm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.testing.agent_client import AgentClient, Stream

_BUSYBOX = "/bin/busybox"
_ENVIRONMENT = ["PATH=/bin"]
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT"]
_NAMESPACES = {"pid": "", "ipc": "", "uts": "", "mount": ""}

# What containerd puts into a specification by default (oci/mounts.go).
_MOUNTS = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),  # noqa: S108  # a place in the container
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/run", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
)


class GuestSandbox:
    """A VM whose agent has mounted the share; ``rootfs`` is the host's side of every container's root.

    Attributes:
        vm: the VM.
        agent: the conversation with its agent.
        rootfs: a root file system of busybox.
    """

    def __init__(self, vmlinux: Path, initrd: Path, *, has_vsock: bool = False, devices: Sequence[str] = ()) -> None:
        self.vm = GuestVm(vmlinux, initrd, has_vsock=has_vsock, devices=devices)
        self.rootfs = self.vm.share / "base" / "rootfs"
        self._cleanup = ExitStack()
        self._ids = itertools.count(1)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(self.vm)
            self.agent: AgentClient = undo.enter_context(self.vm.connect())
            make_busybox_rootfs(self.rootfs)
            # The guest is asked first, so that it has to wait for the device.
            created = self.agent.begin(AGENT_SERVICE, "CreateSandbox", create_sandbox_request())
            self.vm.plug_share()
            self.agent.finish(created, Empty)
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def reconnect(self) -> None:
        """Begin a new conversation with the agent."""
        self.agent.socket.close()
        self.agent = self._cleanup.enter_context(self.vm.connect())

    def create(
        self,
        *args: str,
        stdin: bool = False,
        terminal: bool = False,
        adjust: Callable[[oci.Spec], object] = lambda _: None,
        storages: Sequence[Storage] = (),
        devices: Sequence[Device] = (),
        **namespaces: str,
    ) -> Task:
        """Create a container.

        Args:
            args: what it runs.
            stdin: whether it has standard input.
            terminal: whether it has a terminal.
            adjust: changes its specification.
            storages: what is to be mounted first; the last file system is its root.
            devices: its device nodes.
            namespaces: paths of namespaces to join.
        """
        container_id = f"c{next(self._ids)}"
        task = Task(self, container_id, container_id, stdin=stdin, terminal=terminal)
        file_systems = [storage.mount_point for storage in storages if storage.fstype != "bind"]
        root = file_systems[-1] if file_systems else f"{SHARE_MOUNT_POINT}/base/rootfs"
        spec = container_spec(root, *args, terminal=terminal, **namespaces)
        adjust(spec)
        request = CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,
            devices=list(devices),
            storages=list(storages),
            oci=spec,
            stdin_port=task.stdin.number if task.stdin else NO_STREAM,
            stdout_port=task.stdout.number,
            stderr_port=task.stderr.number if task.stderr else NO_STREAM,
        )
        try:
            self.agent.ask("CreateContainer", request, Empty)
        except AgentError:
            task.close()
            raise
        return task

    def run(
        self,
        *args: str,
        stdin: bool = False,
        terminal: bool = False,
        adjust: Callable[[oci.Spec], object] = lambda _: None,
        storages: Sequence[Storage] = (),
        devices: Sequence[Device] = (),
        **namespaces: str,
    ) -> Task:
        """Create a container and start it."""
        task = self.create(
            *args, stdin=stdin, terminal=terminal, adjust=adjust, storages=storages, devices=devices, **namespaces
        )
        task.start()
        return task

    def exec(self, container: Task, *args: str, stdin: bool = False, terminal: bool = False) -> Task:
        """Start another process in a container."""
        task = Task(self, container.container_id, f"e{next(self._ids)}", stdin=stdin, terminal=terminal)
        request = ExecProcessRequest(
            container_id=container.container_id,
            exec_id=task.exec_id,
            process=_process(*args, terminal=terminal),
            stdin_port=task.stdin.number if task.stdin else NO_STREAM,
            stdout_port=task.stdout.number,
            stderr_port=task.stderr.number if task.stderr else NO_STREAM,
        )
        try:
            self.agent.ask("ExecProcess", request, Empty)
        except AgentError:
            task.close()
            raise
        return task


class Task:
    """A process in the guest and the host's ends of its streams; the lowest ports that are free."""

    def __init__(self, sandbox: GuestSandbox, container_id: str, exec_id: str, *, stdin: bool, terminal: bool) -> None:
        self._sandbox = sandbox
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdout = sandbox.vm.stream()
        self.stderr: Stream | None = None if terminal else sandbox.vm.stream()
        self.stdin: Stream | None = self.stdout if terminal else sandbox.vm.stream() if stdin else None

    def start(self) -> None:
        """Start a container that was created."""
        self._sandbox.agent.ask("StartContainer", ContainerRequest(container_id=self.container_id), Empty)

    def begin_wait(self) -> int:
        """Ask for the exit status; return the call's stream."""
        request = WaitProcessRequest(container_id=self.container_id, exec_id=self.exec_id)
        return self._sandbox.agent.begin(AGENT_SERVICE, "WaitProcess", request)

    def wait(self) -> int:
        """Wait for the exit status, and give the ports back."""
        status = self._sandbox.agent.finish(self.begin_wait(), WaitProcessResponse).status
        self.close()
        return status

    def signal(self, number: int, *, to_all: bool = False) -> None:
        """Send a signal to this process, or to all of its container."""
        request = SignalProcessRequest(
            container_id=self.container_id, exec_id="" if to_all else self.exec_id, signal=number
        )
        self._sandbox.agent.ask("SignalProcess", request, Empty)

    def kill(self) -> None:
        """End the container, read what it still says, wait."""
        self.signal(9, to_all=True)
        self.stdout.read_all()
        self.wait()

    def remove(self) -> None:
        """Have the guest forget the container and give back what it stood on."""
        self._sandbox.agent.ask("RemoveContainer", RemoveContainerRequest(container_id=self.container_id), Empty)

    def close(self) -> None:
        """Give the ports back."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def create_sandbox_request(tag: str = SHARE_TAG) -> CreateSandboxRequest:
    """Return the request that mounts a share."""
    storage = Storage(driver="virtio-fs", source=tag, fstype="virtiofs", mount_point=SHARE_MOUNT_POINT)
    return CreateSandboxRequest(hostname="guest", sandbox_id="sandbox", storages=[storage])


def container_spec(rootfs: str, *args: str, terminal: bool = False, **namespaces: str) -> oci.Spec:
    """Return what the shim would make of containerd's default specification."""
    paths = {**_NAMESPACES, **namespaces}
    return oci.Spec(
        oci_version="1.0.2",
        process=_process(*args, terminal=terminal),
        root=oci.Root(path=rootfs),
        hostname="container",
        mounts=[
            oci.Mount(destination=destination, type=kind, source=source, options=list(options))
            for destination, kind, source, options in _MOUNTS
        ],
        linux=oci.Linux(
            namespaces=[oci.LinuxNamespace(type=kind, path=path) for kind, path in paths.items()],
            masked_paths=["/proc/kcore"],
            readonly_paths=["/proc/sys"],
        ),
    )


def see_cgroups(spec: oci.Spec) -> None:
    """Let a container see the guest's whole cgroup tree."""
    spec.mounts.append(oci.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=["ro"]))


def make_busybox_rootfs(rootfs: Path) -> None:
    """Make a root file system of Debian's static busybox."""
    (rootfs / "bin").mkdir(parents=True)
    for mount_point in ("dev", "proc", "run", "sys", "tmp"):
        (rootfs / mount_point).mkdir()
    shutil.copy(_BUSYBOX, rootfs / "bin" / "busybox")
    applets = subprocess.run([_BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in set(applets) - {"busybox"}:
        (rootfs / "bin" / applet).symlink_to("busybox")


def make_busybox_image(sandbox_id: str) -> Path:
    """Make a disk with that, in a sandbox's directory."""
    directory = Path(paths.sandbox_dir(sandbox_id))
    make_busybox_rootfs(directory / "content")
    image = directory / "image"
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(directory / "content"), str(image), "16M"], check=True)
    return image


def _process(*args: str, terminal: bool) -> oci.Process:
    capabilities = oci.LinuxCapabilities(bounding=_CAPABILITIES, effective=_CAPABILITIES, permitted=_CAPABILITIES)
    return oci.Process(
        terminal=terminal,
        user=oci.User(),
        args=list(args),
        env=_ENVIRONMENT,
        cwd="/",
        capabilities=capabilities,
        no_new_privileges=True,
    )
