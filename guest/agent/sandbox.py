"""The sandbox: the directory that the host shares, the containers, and the storages of each."""

from __future__ import annotations

from common import status
from common.protocols.agent import Empty
from guest.agent import kernel
from guest.agent.files import make_directories, write_text
from guest.agent.log import log
from guest.agent.rpc import RpcError
from guest.agent.storage import Storages, check, let_go

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from common.protocols.agent import Storage
    from guest.agent.container import Container
    from guest.agent.passed import Passed
    from guest.agent.ports import Uevents
    from guest.agent.process import Guest
    from guest.agent.rpc import Call
    from guest.agent.storage import Mounted

_KILL_TIMEOUT_S = 5
_RESOLV_CONF = "/run/kata-containers/sandbox/resolv.conf"


class Sandbox:
    """Owns the containers and the mounts of the guest."""

    def __init__(self, guest: Guest, uevents: Uevents) -> None:
        self.guest = guest
        self.containers: dict[str, Container] = {}
        self._uevents = uevents
        self._storages = Storages(guest.reactor, uevents)
        self._mounted: list[Mounted] = []
        self._of_containers: dict[str, list[Mounted]] = {}
        self._stuck: list[Mounted] = []

    def container(self, container_id: str) -> Container:
        """Return a container.

        Raises:
            RpcError: there is none of that id.
        """
        found = self.containers.get(container_id)
        if found is None:
            raise RpcError(status.NOT_FOUND, f"container {container_id} does not exist")
        return found

    def set_hostname(self, hostname: str) -> None:
        """Name the guest."""
        write_text("/proc/sys/kernel/hostname", hostname)

    def set_dns(self, lines: list[str]) -> None:
        """Set the guest's ``resolv.conf``, where upstream's agent has it too: containers may be given that file."""
        make_directories(_RESOLV_CONF.rpartition("/")[0])
        write_text(_RESOLV_CONF, "".join(f"{line.strip()}\n" for line in lines), mode=0o644)
        make_directories("/etc")
        write_text("/etc/resolv.conf", "", mode=0o644)
        kernel.mount(_RESOLV_CONF, "/etc/resolv.conf", "", kernel.MS_BIND)

    def mount(self, storages: list[Storage], done: Callable[[str], None]) -> None:
        """Mount what all containers share; ``done`` gets an empty text or the first error."""
        self._storages.mount(storages, self._mounted, done)

    def create(
        self,
        container_id: str,
        storages: list[Storage],
        passed: Passed | None,
        make: Callable[[], Container],
        call: Call,
    ) -> None:
        """Have what a container needs, make it, and answer; a container that cannot be made leaves nothing mounted.

        Args:
            container_id: its id.
            storages: what is mounted for it.
            passed: devices of the host that are waited for.
            make: makes it.
            call: is answered.

        Raises:
            RpcError: there is one of that id.
        """
        if container_id in self._of_containers:
            raise RpcError(status.ALREADY_EXISTS, f"container {container_id} exists")
        mounted = self._of_containers[container_id] = []

        def done(error: str) -> None:
            code = status.UNAVAILABLE
            if not error:
                try:
                    self.containers[container_id] = make()
                except RpcError as err:
                    code, error = err.code, err.text
                except OSError as err:
                    code, error = status.INTERNAL, f"container {container_id}: {err}"
            if error:
                call.fail(code, error + self._release(container_id))
            else:
                call.reply(Empty())

        def mount(error: str) -> None:
            if error:
                done(error)
            else:
                self._storages.mount(storages, mounted, done)

        if passed:
            passed.wait(self.guest.reactor, self._uevents, mount)
        else:
            mount("")

    def remove(self, container_id: str, call: Call) -> None:
        """Remove a container, whatever it does, give its storages back, and answer.

        Raises:
            RpcError: there is none of that id.
        """
        self.container(container_id).remove(call, lambda: self._release(container_id))
        del self.containers[container_id]

    def release_disks(self, disks: list[Storage]) -> None:
        """Let go of disks that nothing is mounted of.

        Raises:
            RpcError: something is, or will be; or the kernel cannot.
        """
        check(disks)
        for disk in disks:
            if any(mounted.is_on(disk) for mounted in self._all_mounted()) or self._storages.is_awaited(disk):
                raise RpcError(status.FAILED_PRECONDITION, f"disk {disk.source!r} is in use")
            try:
                let_go(disk)
            except OSError as err:
                raise RpcError(status.INTERNAL, f"disk {disk.source!r}: {err}") from err

    def _all_mounted(self) -> list[Mounted]:
        return [mounted for some in (*self._of_containers.values(), self._mounted, self._stuck) for mounted in some]

    def destroy(self, done: Callable[[], None]) -> None:
        """End every container and call back: then all that they wrote is with the host."""
        left = set(self.containers)

        def finish() -> None:
            timer.cancel()
            for mounted in (*self._of_containers.values(), self._mounted, self._stuck):
                while mounted:
                    mounted.pop().unmount_at_the_end()
            done()

        def on_empty(container_id: str) -> None:
            left.discard(container_id)
            if not left:
                finish()

        # A process that the kernel cannot kill, since its file system does not answer, must not keep the VM.
        timer = self.guest.reactor.later(_KILL_TIMEOUT_S, finish)
        if not left:
            finish()
        for container in self.containers.values():
            container.end(on_empty)

    def _release(self, container_id: str) -> str:
        """Give a container's storages back; return an empty text, or which of them it still uses."""
        stuck = []
        for mounted in reversed(self._of_containers.pop(container_id)):
            try:
                mounted.unmount()
            except OSError as err:
                log("error", "storage not given back", target=mounted.mount_point, error=str(err))
                stuck.append(mounted.mount_point)
                self._stuck.append(mounted)
        return f"; in use: {', '.join(stuck)}" if stuck else ""
