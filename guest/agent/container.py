"""A container: its bundle, its first process and those that were executed in it.

::

    /run/kata-agent/<container>/     config.json, and pid, console and crun.log of the first process
    /run/kata-agent/<container>/<n>/ the same for the n-th exec, with process.json, or update, with resources.json
    /sys/fs/cgroup/<container>/      its cgroup; the host's path means nothing here

A container is created without starting anything: crun runs at its start (docs/adr/0005-crun-runs-at-start.md).
"""

from __future__ import annotations

import posix

from common import status
from common.protocols.agent import Empty, WaitProcessResponse
from common.protocols.oci import Linux, LinuxResources, to_json
from guest.agent.cgroup import Cgroup, OomWatch
from guest.agent.files import make_directories, remove_directory, write_text
from guest.agent.json_text import dumps
from guest.agent.log import log
from guest.agent.process import CREATED, EXITED, RUNNING, STARTING, Process, Streams
from guest.agent.rpc import RpcError
from guest.agent.signals import SIGKILL
from guest.agent.spec import complete, merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from common.protocols import oci
    from common.protocols.stats import StatsContainerResponse
    from guest.agent.process import Guest
    from guest.agent.rpc import Call

_BUNDLES = "/run/kata-agent"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class Container:
    """A container by its id. Processes by exec id; that of the first is the container's."""

    def __init__(self, guest: Guest, container_id: str, spec: oci.Spec, streams: Streams) -> None:
        _check_id(container_id)
        self.id = container_id
        self._guest = guest
        self._spec = complete(spec, container_id, guest.hook_path)
        self._oom_watch: OomWatch | None = None
        self._directory = f"{_BUNDLES}/{container_id}"
        self._cgroup = Cgroup(guest.reactor, container_id)
        self._processes: dict[str, Process] = {}
        self._runs = 0
        self._when_empty: list[Callable[[str], None]] = []
        self._processes[container_id] = Process(guest, streams, self._on_exit)
        make_directories(self._directory)
        self._write_spec()

    @property
    def init(self) -> Process:
        """The first process."""
        return self._processes[self.id]

    def start(self, call: Call) -> None:
        """Start the first process and answer when it runs."""

        def on_started(error: str) -> None:
            if not error:
                self._oom_watch = OomWatch(self._guest.reactor, self._cgroup, lambda: self._guest.oom.report(self.id))
            self._answer(call, error)

        self.init.start(self._directory, ["run", "--bundle", self._directory, self.id], on_started)

    def exec(self, exec_id: str, process: oci.Process, streams: Streams, call: Call) -> None:
        """Start another process and answer when it runs.

        Raises:
            RpcError: the id is taken, or the container does not run.
        """
        if exec_id in self._processes:
            raise RpcError(status.ALREADY_EXISTS, f"exec {exec_id} exists in container {self.id}")
        self._check_running()
        if self._cgroup.is_frozen:  # crun would wait in it for ever
            raise RpcError(status.FAILED_PRECONDITION, f"container {self.id} is paused")
        started = Process(self._guest, streams, self._on_exit)
        directory = self._scratch("process.json", process)
        self._processes[exec_id] = started

        def on_started(error: str) -> None:
            remove_directory(directory)
            if error:
                self._forget(exec_id)
            self._answer(call, error)

        started.start(directory, ["exec", "--process", f"{directory}/process.json", self.id], on_started)

    def process(self, exec_id: str) -> Process:
        """Return a process; an empty id means the first.

        Raises:
            RpcError: there is none of that id.
        """
        found = self._processes.get(exec_id or self.id)
        if found is None:
            raise RpcError(status.NOT_FOUND, f"process {exec_id} does not exist in container {self.id}")
        return found

    def signal_all(self, number: int) -> None:
        """Send a signal to every process of the container.

        Raises:
            RpcError: it has ended.
        """
        if self.init.state in (CREATED, STARTING, EXITED):
            self.init.signal(number)
        elif number == SIGKILL:
            self._cgroup.kill()
        else:
            for pid in self._cgroup.processes():
                _signal_if_alive(pid, number)

    def freeze(self, call: Call, *, is_frozen: bool) -> None:
        """Have all processes stand still, or go on, and answer when they do.

        Raises:
            RpcError: it does not run.
        """
        self._check_running()
        self._cgroup.freeze(lambda error: self._answer(call, error), is_frozen=is_frozen)

    def update(self, resources: oci.LinuxResources, call: Call) -> None:
        """Change limits, now or for the start, and answer. What is not mentioned stays as it is.

        Raises:
            RpcError: it is starting, or has ended.
        """
        if self.init.state == CREATED:
            merge(self._linux_resources(), resources)
            self._write_spec()
            call.reply(Empty())
            return
        self._check_running()
        directory = self._scratch("resources.json", resources)

        def on_updated(error: str) -> None:
            remove_directory(directory)
            self._answer(call, error)

        arguments = ["update", "--resources", f"{directory}/resources.json", self.id]
        self._guest.crun.spawn(directory, arguments, [self._guest.null] * 3, on_updated)

    def stats(self) -> StatsContainerResponse:
        """Return what it has used so far; zeros before it started."""
        from guest.agent import stats

        return stats.read(self._cgroup.path)

    def wait(self, exec_id: str, call: Call) -> None:
        """Answer when a process has ended. An exec that has been waited for is forgotten: its id may be used again.

        Raises:
            RpcError: there is no such process.
        """

        def on_settled(exit_status: int) -> None:
            call.reply(WaitProcessResponse(status=exit_status))
            self._forget(exec_id)

        self.process(exec_id).wait(on_settled)

    def kill(self, when_empty: Callable[[str], None]) -> None:
        """Kill every process; call back with our id when the last one is gone."""
        self._when_empty.append(when_empty)
        if self.init.state != EXITED:
            self.signal_all(SIGKILL)
        self._on_exit()

    def end(self, when_gone: Callable[[str], None]) -> None:
        """Kill it for good, with the guest: hooks that are to run afterwards do; call back with our id."""

        def on_killed(container_id: str) -> None:
            if self._spec.hooks and self._spec.hooks.poststop:
                self._delete(lambda _error: when_gone(container_id))
            else:
                when_gone(container_id)

        self.kill(on_killed)

    def remove(self, call: Call, release: Callable[[], str]) -> None:
        """Kill what runs, clear up and answer; ``release`` gives back what it stood on, or says why it cannot."""

        def on_deleted(error: str) -> None:
            self._guest.oom.forget(self.id)
            for process in self._processes.values():
                process.close()
            remove_directory(self._directory)
            self._answer(call, error + release())

        self.kill(lambda _id: self._delete(on_deleted))

    def _delete(self, on_deleted: Callable[[str], None]) -> None:
        arguments = ["delete", "--force", self.id]
        self._guest.crun.spawn(self._directory, arguments, [self._guest.null] * 3, on_deleted)

    def _check_running(self) -> None:
        if self.init.state != RUNNING:
            raise RpcError(status.FAILED_PRECONDITION, f"container {self.id} is {self.init.state}, not running")

    def _answer(self, call: Call, error: str) -> None:
        """Answer a call for which the runtime has done something, and only then take the time to log it."""
        if error:
            call.fail(status.INTERNAL, error)
        else:
            call.reply(Empty())
            log("info", "done", method=call.method, request=call.request_id, container=self.id)

    def _forget(self, exec_id: str) -> None:
        if exec_id not in ("", self.id):
            forgotten = self._processes.pop(exec_id, None)
            if forgotten:
                forgotten.close()

    def _write_spec(self) -> None:
        write_text(f"{self._directory}/config.json", dumps(to_json(self._spec)))

    def _linux_resources(self) -> oci.LinuxResources:
        linux = self._spec.linux = self._spec.linux or Linux()
        linux.resources = linux.resources or LinuxResources()
        return linux.resources

    def _scratch(self, name: str, content: oci.Process | oci.LinuxResources) -> str:
        """Make a directory for one run of crun, with one file for it; return its path."""
        self._runs += 1
        directory = f"{self._directory}/{self._runs}"
        make_directories(directory)
        write_text(f"{directory}/{name}", dumps(to_json(content)))
        return directory

    def _on_exit(self) -> None:
        if self._oom_watch:
            self._oom_watch.check()
            if self.init.state == EXITED:
                self._oom_watch.close()
                self._oom_watch = None
        if all(process.state == EXITED for process in self._processes.values()):
            waiting, self._when_empty = self._when_empty, []
            for callback in waiting:
                callback(self.id)


def _signal_if_alive(pid: int, number: int) -> None:
    try:
        posix.kill(pid, number)
    except ProcessLookupError:
        return  # it ended after the cgroup was read


def _check_id(container_id: str) -> None:
    """Refuse an id that would be another path."""
    if not container_id or container_id[0] == "." or not _ID_CHARACTERS.issuperset(container_id):
        raise RpcError(status.INVALID_ARGUMENT, f"{container_id!r} is not a container id")
