"""A whole host in one directory: the services under supervisord, and a containerd of its own.

The demo, the end-to-end tests and the benchmark stand on it. Everything lies below one directory with a short name
(Unix sockets end at 107 bytes), and nothing outlives the block: what the orderly end has left is kept in
:attr:`Stack.left_behind`, for those who look for leaks, and then removed by force.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import toml

from common import shards
from common.bus.client import BusClient
from common.bus.wire import Empty
from common.config import HYPERVISORS
from common.errors import InterruptedCallError, UnavailableError
from common.paths import RUN_DIR_VARIABLE
from common.services import vmm
from common.services.health import HEALTH
from common.testing import oci_image
from common.testing.isolation import variable
from common.testing.leaks import Footprint, cmdline_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    import psutil

CHECKOUT = Path(__file__).resolve().parent.parent.parent
GUEST = Path(os.environ.get("PYKATA_GUEST_DIR") or CHECKOUT / "build/guest")
VIRTIOFSD = os.environ.get("PYKATA_TEST_VIRTIOFSD") or "/usr/lib/qemu/virtiofsd"
"""Debian's, or one of yours: the one written in Rust takes other arguments."""
BIN = Path(sys.executable).parent
RUNTIME = "io.containerd.kata.v2"
IMAGE = oci_image.REFERENCE
DEVICE_MANAGER = "device-manager:device-manager-0"
"""The device manager's program in supervisord."""

_READY = "containerd successfully booted"
_READY_TIMEOUT_S = float(os.environ.get("PYKATA_TEST_TIMEOUT_S", "150"))
_STOP_TIMEOUT_S = 20.0


class Stack:
    """A running host; a context manager.

    Attributes:
        root: the one directory that holds it.
        run_dir: the services' run directory, below it.
        config: the configuration.toml that it uses.
        services: programs of supervisord that answer on the bus, and their names there.
        left_behind: what was still there after the orderly end, in words; empty if all is well.
        supervisord: the services' parent.
        containerd: the containerd that runs now.
    """

    def __init__(
        self,
        *,
        listen: str = "127.0.0.1:0",
        hypervisor: str = "qemu",
        section: Mapping[str, object] | None = None,
        programs: Path | None = None,
        plugins: Mapping[str, object] | None = None,
        device_managers: int = 1,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Make the directory; nothing runs yet.

        Args:
            listen: where kata-monitor listens.
            hypervisor: what its sandboxes run on.
            section: changes to that one's section in configuration.toml, for all of this stack's life.
            programs: a directory of programs that are taken before the host's: another containerd with its ``ctr`` and
                its shim of runc, or another shim.
            plugins: what containerd's configuration says of its plugins; it ignores those that it does not have.
            device_managers: how many share the sandboxes.
            report: is told each step of the start, in words, before it is done.
        """
        self.root = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
        self.run_dir = self.root / "run"
        self.config = self.root / "configuration.toml"
        self.left_behind: list[str] = []
        self._footprint = Footprint(root=self.root, run_dir=self.run_dir, address=self.socket)
        self._listen = listen
        self.services = {
            f"vmm-manager-{hypervisor}": vmm.service_name(hypervisor),
            **{f"device-manager:device-manager-{n}": shards.service_name(n) for n in range(device_managers)},
        }
        self._device_managers = device_managers
        self._hypervisor = hypervisor
        self._section = dict(section or {})
        self._plugins = dict(plugins or {})
        self._programs = [BIN, *([programs] if programs else []), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        self._report = report
        self._exit = ExitStack()
        self.supervisord: subprocess.Popen[bytes]
        self.containerd: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        try:
            self._exit.callback(self._clear)
            (self.run_dir / "log").mkdir(parents=True, mode=0o700)
            self.write_config()
            self._report("starting supervisord and the services")
            self._start_services()
            self._report("starting a containerd")
            self.start_containerd()
            self._exit.callback(lambda: _stop(self.containerd))
            self._report("importing an image made of busybox")
            self._import_image()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of everything that belongs to this stack."""
        return {
            **os.environ,
            "PATH": ":".join(map(str, self._programs)),
            RUN_DIR_VARIABLE: str(self.run_dir),
            "PYKATA_BIN": str(BIN),
            **{f"PYKATA_{name.upper()}": str(name == self._hypervisor).lower() for name in HYPERVISORS},
            "PYKATA_LISTEN": self._listen,
            shards.VARIABLE: str(self._device_managers),
            "KATA_CONF_FILE": str(self.config),
            "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS": "1",  # of ctr 2.x, on a host with cgroup v1
        }

    @property
    def socket(self) -> Path:
        """Containerd's socket."""
        return self.root / "containerd.sock"

    def write_config(
        self, *, section: Mapping[str, object] | None = None, agent: Mapping[str, object] | None = None
    ) -> Path:
        """Write configuration.toml, with changes to its sections; return its path."""
        content: dict[str, object] = {
            "kernel": str(GUEST / "vmlinux"),
            "initrd": str(GUEST / "initrd.img"),
            "default_memory": 512,
            "virtio_fs_daemon": VIRTIOFSD,
            **self._section,
            **(section or {}),
        }
        whole = {"hypervisor": {self._hypervisor: content}, "agent": {"kata": dict(agent or {})}, "runtime": {}}
        self.config.write_text(toml.dumps(whole))
        return self.config

    def ctr(
        self, *arguments: str, timeout_s: float = 300.0, check: bool = False, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ``ctr`` against this stack's containerd.

        Raises:
            SubprocessError: it failed, and ``check`` is set.
        """
        result = subprocess.run(
            self.ctr_argv(*arguments),
            env=self.environment,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            input=stdin if stdin is not None else b"",
        )
        if check and result.returncode:
            raise subprocess.SubprocessError(
                f"ctr {' '.join(arguments)} failed: {result.stderr.decode(errors='replace')}"
            )
        return result

    def ctr_argv(self, *arguments: str) -> list[str]:
        """Return the command line of :meth:`ctr`, for those who run it themselves."""
        return ["ctr", "--address", str(self.socket), *arguments]

    def supervisorctl(self, *arguments: str) -> str:
        """Run ``supervisorctl``; return what it printed."""
        return subprocess.run(
            [BIN / "supervisorctl", "-c", CHECKOUT / "supervisord.conf", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        ).stdout

    def wait_ready(self) -> None:
        """Wait until each service answers on the bus."""
        with variable(RUN_DIR_VARIABLE, str(self.run_dir)):  # the bus finds its sockets by it
            asyncio.run(_wait_services(self.services.values()))

    def remains(self) -> list[str]:
        """Return what containers left behind: nothing, while none exists."""
        return self._footprint.of_containers()

    def processes(self, program: str = "") -> list[psutil.Process]:
        """Return this stack's living processes, or those that run a program, perhaps by an interpreter."""
        return [p for p in self._footprint.processes() if any(word.endswith(program) for word in cmdline_of(p)[:4])]

    def logs(self, lines: int = 60) -> str:
        """Return the last lines of what each service and containerd logged."""
        files = sorted((self.run_dir / "log").glob("*.log"))
        tails = ["\n".join(file.read_text(errors="replace").splitlines()[-lines:]) for file in files]
        return "\n".join(f"== {file.name}\n{tail}" for file, tail in zip(files, tails, strict=True))

    @contextmanager
    def new_lines(self, log: str) -> Iterator[Iterator[str]]:
        """What is written to a log from now on, line by line as it comes, until one waited too long."""
        path = self.run_dir / "log" / log
        with tail_of(path, path.stat().st_size) as lines:
            yield lines

    def start_containerd(self) -> None:
        """Start containerd, at first or after its death, and return when it has said that it is ready.

        Raises:
            SubprocessError: it has ended instead.
        """
        path = self.run_dir / "log/containerd.log"
        with path.open("ab") as log:
            said_before = log.tell()
            self.containerd = subprocess.Popen(
                ["containerd", "--config", self._write_containerd_config()],  # noqa: S607 - found by the PATH of this stack
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stderr=log,
                process_group=0,  # Ctrl-C is for whoever uses the stack: it ends in our order
            )
        with tail_of(path, said_before, f"--pid={self.containerd.pid}") as lines:
            is_ready = any(_READY in line for line in lines)
        if not is_ready:
            self.containerd.wait()
            raise subprocess.SubprocessError(f"containerd did not start:\n{self.logs()}")

    def _write_containerd_config(self) -> Path:
        config = self.root / "containerd.toml"
        content = {
            "version": 2,
            "root": str(self.root / "root"),
            "state": str(self.root / "state"),
            "disabled_plugins": ["io.containerd.grpc.v1.cri"],
            "grpc": {"address": str(self.socket)},
            "plugins": self._plugins,
        }
        config.write_text(toml.dumps(content))
        return config

    def _start_services(self) -> None:
        command: list[str | Path] = [BIN / "supervisord", "-c", CHECKOUT / "supervisord.conf"]
        self.supervisord = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
        self._exit.callback(_stop, self.supervisord)
        self.wait_ready()

    def _import_image(self) -> None:
        archive = self.root / "image.tar"
        oci_image.write(archive)
        self.ctr("image", "import", str(archive), check=True)

    def _clear(self) -> None:
        """Look for what is left after the orderly end, and remove everything, whatever happened before."""
        self.left_behind = self._footprint.everything()
        self._footprint.remove()
        shutil.rmtree(self.root)


async def _wait_services(services: Iterable[str]) -> None:
    async with asyncio.timeout(_READY_TIMEOUT_S), BusClient() as bus:
        for service in services:
            while True:
                try:
                    await bus.call(service, HEALTH, Empty(), timeout_s=5)
                except (UnavailableError, InterruptedCallError):  # after the bus has waited for it
                    continue
                break


@contextmanager
def tail_of(path: Path, offset: int = 0, *options: str) -> Iterator[Iterator[str]]:
    """The lines of a file from an offset on, those that are there and those that come, until one waited too long."""
    limit = ["/usr/bin/timeout", str(_READY_TIMEOUT_S)]
    command = [*limit, "/usr/bin/tail", "-c", f"+{offset + 1}", "-f", *options, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        try:
            yield tail.stdout
        finally:
            tail.terminate()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
