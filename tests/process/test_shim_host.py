"""The host that forks shims: its shims are like any other, and whatever becomes of it, each start has one server."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import pytest

from common import paths
from common.errors import KataError
from common.linux import cgroup
from common.protocols import task
from common.testing.shim_client import Reader, Shim, started
from common.testing.shim_stand import NAMESPACE, ShimStand, stand_test
from procs.shim import record
from procs.shim.host import MAX_MESSAGE
from procs.shim.launch import READY, Launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIN = Path(sys.executable).parent
START = BIN / "containerd-shim-kata-v2"

# What a caller may have that the host has not, given to what follows.
UNUSUAL = """#!/bin/sh
set -e
umask 027
ulimit -n 400
echo 300 > /proc/self/oom_score_adj
for group in GROUPS; do echo 0 > $group/cgroup.procs; done
exec nice -n 5 taskset -c 1 PROGRAM "$@"
"""


class Host:
    """The host, listening, as supervisord starts it; a context manager that kills it."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(
            command or (BIN / "kata-shim-host",),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout
        assert b'"listening"' in self._output.readline()
        os.set_blocking(self._output.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()

    def said(self) -> str:
        """Return what it and its forks have said and was not read yet."""
        return os.read(self._output.fileno(), 1 << 16).decode()

    def has_forked(self, shim: int) -> bool:
        """Return whether a shim is of this host: forks share the place of the stack, which is random."""
        return _stack(shim) == _stack(self.process.pid)


def _stack(pid: int) -> str:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.split("-")[1].split()[0] for line in lines if line.endswith("[stack]"))


class Bundle:
    """A sandbox of which only ``start`` and ``delete`` are wanted: there is no VM manager."""

    def __init__(self, root: Path, name: str) -> None:
        self.id = name
        self.path = root / name
        self.path.mkdir()
        self.program: tuple[str | Path, ...] = (START,)
        (self.path / "config.json").write_text("{}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.execute("delete").returncode == 0
        assert record.read(self.id) is None

    def execute(self, action: str) -> subprocess.CompletedProcess[bytes]:
        """Execute the shim's program."""
        command = [*self.program, "-namespace", NAMESPACE, "-address", self.path / "c.sock", "-id", self.id, action]
        return subprocess.run(command, cwd=self.path, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def start(self) -> int:
        """Start the shim; return its pid, which is the only one."""
        done = self.execute("start")
        assert (done.returncode, done.stderr) == (0, b"")
        pid = int((self.path / "shim.pid").read_text())
        assert (record.read(self.id) or {})["pid"] == pid
        assert self.servers() == [pid]
        return pid

    def servers(self) -> list[int]:
        """Return who has the sandbox's directory open, and with it the lock."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if any(_is_open(fd, paths.sandbox_dir(self.id)) for fd in (process / "fd").iterdir()):
                    found.append(int(process.name))
        return found


def _is_open(fd: Path, path: str) -> bool:
    try:
        return str(fd.readlink()) == path
    except OSError:  # closed meanwhile, or of another world
        return False


@pytest.fixture
def bundle(run_dir: Path) -> Iterator[Bundle]:
    with Bundle(run_dir, f"h{os.urandom(4).hex()}") as made:
        yield made


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """A cgroup in each of two hierarchies: an old one, and cgroup2."""
    name = f"pykata-test-{os.urandom(4).hex()}"
    made = [Path("/sys/fs/cgroup/pids") / name, Path(cgroup.mount_point()) / name]
    for group in made:
        group.mkdir()
    yield made
    for group in made:
        group.rmdir()


def traits(pid: int) -> dict[str, object]:
    """Return what a process has of its own making or its parent's, as proc(5) shows it."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    numbers = (process / "stat").read_text().rpartition(")")[2].split()
    wanted = ("Umask", "PPid", "Groups", "SigBlk", "SigIgn", "SigCgt", "Cpus_allowed", "CapEff", "NoNewPrivs")
    return {
        **{name: status[name] for name in wanted},
        **{name: (process / name).readlink() for name in ("cwd", "root", "exe")},
        **{f"fd {number}": (process / "fd" / number).readlink() for number in "012"},
        **{name: (process / name).read_text() for name in ("comm", "cgroup", "oom_score_adj", "limits")},
        "command line": (process / "cmdline").read_bytes().rstrip(b"\0"),
        "descriptors": sorted(str(fd.readlink()).partition(":")[0] for fd in (process / "fd").iterdir()),
        "namespaces": sorted(str(entry.readlink()) for entry in (process / "ns").iterdir()),
        "session is of a process that has ended": not Path(f"/proc/{numbers[3]}").exists(),
        "terminal and priority": (numbers[4], numbers[15], numbers[16]),
        "limits": [resource.prlimit(pid, limit) for limit in range(16)],
    }


async def settle(stand: ShimStand, shim: Shim) -> None:
    """Start a container that has a logger, after which a shim's descriptors and children stay as they are."""
    script = "exec 5>&-; exec cat <&3 >/dev/null"
    await shim.create("sleep", "1000", stdout=f"binary:///bin/sh?-c={quote(script)}")
    await shim.start()


def test_a_shim_of_the_host_is_like_a_callers_own(groups: list[Path]) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        caller = stand.root / START.name
        text = UNUSUAL.replace("GROUPS", " ".join(map(str, groups))).replace("PROGRAM", str(START))
        caller.write_text(text)
        caller.chmod(0o700)
        stand.PROGRAM = caller
        seen = []
        for context in (Host(), contextlib.nullcontext()):
            with context as host:
                await settle(stand, await started(stand))
                if host is not None:
                    assert host.has_forked(stand.shim_pid)
                await stand.containerd.wait_topics(2)  # whose address is in the caller's environment
                seen.append(traits(stand.shim_pid))
            await stand.delete()
            await stand.vms.end_vm()
        assert seen[0] == seen[1]
        assert seen[0]["Umask"] == "\t0027"
        assert all(group.name in str(seen[0]["cgroup"]) for group in groups)
        assert f"-id\0{stand.id}\0".encode() in seen[0]["command line"]  # type: ignore[operator]

    test()


@stand_test
async def test_nothing_of_the_hosts_environment_is_left(stand: ShimStand) -> None:
    with Host("/usr/bin/env", "KATA_CONF_FILE=/of/the/host.toml", BIN / "kata-shim-host") as host:
        done = await stand.run("start", options=b"")
        assert done.returncode == 0
        assert host.has_forked(stand.shim_pid)
        with pytest.raises(KataError, match=r"configuration\.toml") as failure:
            await Shim(stand, await stand.connect()).create("true")
        assert "/of/the/host.toml" not in str(failure.value)


@stand_test
async def test_a_container_outlives_the_host(stand: ShimStand) -> None:
    with Host() as host:
        shim = await started(stand)
        out = Reader(stand, "out")
        await shim.create("sh", "-c", "read line; echo hello; exit 3", stdin=stand.fifo("in"), stdout=out.path)
        await shim.start()
        assert host.has_forked(stand.shim_pid)
    with Host():
        Path(stand.root, "in").write_bytes(b"\n")
        assert await shim.wait() == 3
        assert await out.all() == b"hello\n"
        await shim.delete()
        await shim.shutdown()
        await stand.wait_shim_gone()
        assert stand.leftovers() == []


@contextlib.contextmanager
def misbehaving(serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Something that listens where the host does, and does as it is told with one caller."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            serve(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(paths.shim_host_socket())
        listener.listen()
        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


def ends_at_once(_: socket.socket) -> None:
    """As a host that is killed before it forks."""


def declines(connection: socket.socket) -> None:
    connection.recv(MAX_MESSAGE)


def talks_nonsense(connection: socket.socket) -> None:
    connection.recv(MAX_MESSAGE)
    connection.send(b"later")


def ends_after_it_was_ready(connection: socket.socket) -> None:
    connection.recv(MAX_MESSAGE)
    connection.send(READY)


def ends_with_the_listener(connection: socket.socket) -> None:
    ends_after_it_was_ready(connection)
    _, fds, _, _ = socket.recv_fds(connection, 16, 2)
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


def is_too_late(connection: socket.socket) -> None:
    connection.recv(MAX_MESSAGE)
    assert connection.recv(1) == b"", "the caller gives up"
    with contextlib.suppress(BrokenPipeError):
        connection.send(READY)


@pytest.mark.parametrize(
    "serve",
    [ends_at_once, declines, talks_nonsense, ends_after_it_was_ready, ends_with_the_listener, is_too_late],
)
def test_start_forks_by_itself_when_the_host_does_not(bundle: Bundle, serve: Callable[[socket.socket], None]) -> None:
    with misbehaving(serve):
        bundle.start()


def test_a_socket_that_a_dead_host_has_left_is_no_hindrance(bundle: Bundle) -> None:
    with Host():
        pass
    assert Path(paths.shim_host_socket()).is_socket()
    bundle.start()
    with Host() as host:
        bundle.execute("delete")
        assert host.has_forked(bundle.start())


def test_a_host_that_wakes_up_too_late_forks_nothing(bundle: Bundle) -> None:
    with Host() as host:
        host.process.send_signal(signal.SIGSTOP)
        pid = bundle.start()
        host.process.send_signal(signal.SIGCONT)
        with calling() as caller:  # which it serves after the other
            caller.shutdown(socket.SHUT_WR)
            assert caller.recv(16) == b""
        assert bundle.servers() == [pid]
        assert not host.has_forked(pid)


def test_a_second_host_waits_for_the_end_of_the_first(bundle: Bundle) -> None:
    with Host() as first, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Host)
        assert first.has_forked(bundle.start())
        first.process.kill()
        with waiting.result() as second:
            bundle.execute("delete")
            assert second.has_forked(bundle.start())


def test_many_start_at_once(run_dir: Path) -> None:
    with Host() as host, contextlib.ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        bundles = [stack.enter_context(Bundle(run_dir, f"h{os.urandom(4).hex()}")) for _ in range(20)]
        pids = list(pool.map(Bundle.start, bundles))
        assert len(set(pids)) == 20
        assert any(host.has_forked(pid) for pid in pids)


def test_the_host_is_killed_among_many_starts(run_dir: Path) -> None:
    """Whatever it was at: each start has one server, the host's or its own."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        bundles = [stack.enter_context(Bundle(run_dir, f"h{os.urandom(4).hex()}")) for _ in range(12)]
        starts = [pool.submit(bundle.start) for bundle in bundles]
        for start in starts[::3]:
            with Host():
                start.result()
        assert len({start.result() for start in starts}) == 12


def test_before_a_fork_the_host_has_one_thread_and_no_more_than_its_socket(run_dir: Path) -> None:
    with Host() as host:
        assert len(list(Path(f"/proc/{host.process.pid}/task").iterdir())) == 1
        found = [str(fd.readlink()) for fd in Path(f"/proc/{host.process.pid}/fd").iterdir()]
        lock = str(run_dir / "shim-host.lock")
        assert sorted(name.partition(":")[0] for name in found) == ["/dev/null", lock, "pipe", "pipe", "socket"]
        assert Path(paths.shim_host_socket()).stat().st_mode & 0o077 == 0
        assert Path(f"/proc/{host.process.pid}/comm").read_text() == "kata-shim-host\n"


# A host that has loaded one more module of ours, which the test may change.
LOADED = """
import sys
import common
common.__path__.append({directory!r})
import common.extra
from procs.shim import host
sys.exit(host.main())
"""


def test_code_that_was_replaced_is_not_forked(bundle: Bundle, run_dir: Path) -> None:
    (run_dir / "extra.py").write_text("")
    with Host(sys.executable, "-I", "-c", LOADED.format(directory=str(run_dir))) as host:
        first = bundle.start()
        assert host.has_forked(first)
        (run_dir / "extra.py").write_text("# a new version\n")
        bundle.execute("delete")
        bundle.start()
        assert host.process.wait(60) == 0, "supervisord starts the new one"


# A host whose forks note what they import.
NOTING = """
import os, sys
from procs.shim import host
def note(event, arguments):
    if event == "import" and os.getpid() != pid:
        fd = os.open({path!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(fd, arguments[0].encode() + b" ")
        os.close(fd)
pid = os.getpid()
sys.addaudithook(note)
sys.exit(host.main())
"""


@stand_test
async def test_a_shim_of_the_host_has_nothing_to_import(stand: ShimStand) -> None:
    noted = stand.root / "imported"
    with Host(sys.executable, "-I", "-c", NOTING.format(path=str(noted))) as host:
        shim = await started(stand)
        assert host.has_forked(stand.shim_pid)
        out = Reader(stand, "out")
        await settle(stand, shim)
        await shim.exec("e1", "echo", "hello", stdout=out.path)
        await shim.start("e1")
        assert await shim.wait("e1") == 0
        assert await out.all() == b"hello\n"
        await shim.ask("Pause")
        await shim.ask("Resume")
        await stand.call(shim.client, "Stats", task.IdRequest(id=stand.id), task.StatsResponse)
        await shim.kill(9)
        await shim.wait()
        await shim.delete()
        await shim.shutdown()
        await stand.wait_shim_gone()
    assert not noted.exists() or noted.read_text() == ""


@contextlib.contextmanager
def calling() -> Iterator[socket.socket]:
    """Somebody connected to the host, who may say what he likes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(paths.shim_host_socket())
        yield connection


def message(sandbox_id: str) -> bytes:
    launch = Launch(sandbox_id="x", namespace="n", address="/a", bundle="/b", is_debug=False)
    launch.sandbox_id = sandbox_id
    return launch.encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff" * 100, "not enough values"),
        (b"\0" * 100, "the caller's code is ''"),
        (b"/elsewhere" + b"\0" * 7, "the caller's code is '/elsewhere'"),
        (message("../../etc"), "container id '../../etc' is not valid"),
        (message("x") + b"\0" * MAX_MESSAGE, "the message exceeds"),
    ],
    ids=["noise", "nothing", "other code", "no id", "too long"],
)
def test_what_is_not_a_start_is_declined(run_dir: Path, data: bytes, reason: str) -> None:
    with Host() as host:
        for _ in range(2):
            with calling() as caller:
                caller.send(data)
                assert caller.recv(16) == b""
                assert reason in host.said()


def test_other_users_are_declined(run_dir: Path) -> None:
    with Host() as host:
        run_dir.chmod(0o711)
        Path(paths.shim_host_socket()).chmod(0o777)
        os.seteuid(65534)
        try:
            with calling() as caller:
                assert caller.recv(16) == b""
        finally:
            os.seteuid(0)
        assert "the caller is user 65534" in host.said()


@pytest.mark.parametrize("words", [[], [READY]], ids=["says no more", "passes nothing"])
def test_a_caller_without_a_listener_gets_no_server(run_dir: Path, words: list[bytes]) -> None:
    with Host() as host, calling() as caller:
        caller.send(message("x"))
        assert caller.recv(16) == READY
        for word in words:
            caller.send(word)
        assert caller.recv(16) == b""
        assert "declined" in host.said()


def test_a_caller_that_has_gone_gets_no_server(run_dir: Path) -> None:
    with Host() as host:
        with calling() as caller:
            caller.send(message("x"))
            assert caller.recv(16) == READY
        with calling() as caller:  # the forks end in any order, but they end
            caller.shutdown(socket.SHUT_WR)
            assert caller.recv(16) == b""
        assert "declined" in host.said()


_UNSHARE = {"uts": "--uts", "mnt": "--mount", "net": "--net"}


@pytest.mark.parametrize("namespace", _UNSHARE)
def test_a_caller_in_another_namespace_forks_by_itself(bundle: Bundle, namespace: str) -> None:
    bundle.program = ("unshare", _UNSHARE[namespace], START)
    with Host() as host:
        assert not host.has_forked(bundle.start())
        assert f"{namespace} of the caller is" in host.said()
