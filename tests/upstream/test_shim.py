"""Our guest with upstream's Go shim: containerd, that shim, KVM and vsock of the host's kernel, behind them our agent.

``ctr`` lets that shim see no end of standard input: at the end of its own it calls CloseIO and closes the FIFO behind
the answer, and the shim answers when the FIFO has ended. So the end comes by the Task API here, from beside containerd.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import toml

from common.testing import containers
from common.testing.fake_vmms import trust_kvm
from common.testing.isolation import in_event_loop, run_dir
from common.testing.shim_client import Reader, Shim
from common.testing.shim_stand import ShimStand
from common.testing.stack import GUEST, IMAGE, VIRTIOFSD, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

_RUNTIME = "io.containerd.kata-upstream.v2"
_SYSLOG = Path("/dev/log")
_TIMEOUT_S = 900
_MARK = "cryptomgr.notests"
"""A parameter of the guest's kernel that no host has."""

_VIRTIOFSD = f"""#!{sys.executable} -IS
# Upstream's shim drives the virtiofsd that is written in Rust; Debian 12 has the one in C, with other arguments.
import os, sys
options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
os.execv("{VIRTIOFSD}", ["virtiofsd", f"--fd={{options['fd']}}", "-o", f"source={{options['shared-dir']}}"])
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host whose containerd finds upstream's shim."""
    with syslog(), tempfile.TemporaryDirectory(prefix="kt-", dir="/tmp") as directory:
        programs = Path(directory)
        (programs / "containerd-shim-kata-upstream-v2").symlink_to(os.environ["PYKATA_UPSTREAM_SHIM"])
        (programs / "virtiofsd").write_text(_VIRTIOFSD)
        (programs / "virtiofsd").chmod(0o755)
        config = programs / "configuration.toml"
        config.write_text(toml.dumps(_configuration(str(programs / "virtiofsd"))))
        stack = Stack(programs=programs)
        stack.run_dir.mkdir(mode=0o700)
        trust_kvm(stack.run_dir)  # our services run none of the VMs, and need not find out
        with stack:
            yield Host(stack, config)


class Host:
    """Runs containers of upstream's shim."""

    def __init__(self, stack: Stack, config: Path) -> None:
        self.stack = stack
        self._runtime = ("--runtime", _RUNTIME, "--runtime-config-path", str(config))

    def ctr(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run ``ctr`` with a standard input that does not end."""
        read, write = os.pipe()
        try:
            os.write(write, stdin)
            return subprocess.run(
                self.stack.ctr_argv(*arguments),
                env=self.stack.environment,
                stdin=read,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        finally:
            os.close(read)
            os.close(write)

    def run(self, *flags: str, script: str, stdin: bytes = b"") -> tuple[str, subprocess.CompletedProcess[bytes]]:
        """Run a shell script in a container of its own; return its name, and what ``ctr run`` printed."""
        name = containers.new_name()
        return name, self.ctr("run", *flags, *self._runtime, IMAGE, name, "sh", "-c", script, stdin=stdin)

    def bundle(self, name: str) -> Path:
        """Return where containerd has a container."""
        return self.stack.root / "state/io.containerd.runtime.v2.task/default" / name


@contextmanager
def syslog() -> Iterator[None]:
    """A syslog where the host has none: upstream's shim insists on it. pytest shows what was logged."""
    if _SYSLOG.exists():
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(_SYSLOG))

        def read() -> None:
            while line := log.recv(1 << 16):
                sys.stdout.write(f"{line.decode(errors='replace')}\n")

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            log.shutdown(socket.SHUT_RD)
            thread.join()
            _SYSLOG.unlink()


def _configuration(virtiofsd: str) -> dict[str, object]:
    """Return what upstream's shim needs to be told; the rest are its own defaults."""
    qemu: dict[str, object] = {
        "path": "/usr/bin/qemu-system-x86_64",
        "kernel": str(GUEST / "vmlinux"),
        "initrd": str(GUEST / "initrd.img"),
        "machine_type": "q35",
        "kernel_params": f"quiet {_MARK}",
        "default_vcpus": 1,
        "default_memory": 512,
        "default_bridges": 1,
        "shared_fs": "virtio-fs",
        "virtio_fs_daemon": virtiofsd,
        "valid_virtio_fs_daemon_paths": [virtiofsd],
        "virtio_fs_cache": "auto",
        "block_device_driver": "virtio-blk",
        "entropy_source": "/dev/urandom",
        "disable_guest_selinux": True,
    }
    return {
        "hypervisor": {"qemu": qemu},
        "agent": {"kata": {"dial_timeout": _TIMEOUT_S}},
        "runtime": {
            "enable_debug": True,
            "internetworking_model": "none",
            "disable_new_netns": True,
            "sandbox_cgroup_only": True,
            "disable_guest_seccomp": True,
            "create_container_timeout": _TIMEOUT_S,
        },
    }


def test_a_container_with_its_streams_and_its_exit_status(host: Host) -> None:
    script = f"grep -c {_MARK} /proc/cmdline; read line; echo $line; echo wrong >&2; exit 3"
    name, ran = host.run("--rm", script=script, stdin=b"right\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, b"1\nright\n", b"wrong\n")
    assert host.stack.remains() == [], name


def test_what_clients_do_with_a_container_that_runs(host: Host) -> None:
    name, ran = host.run("-d", "--null-io", script="exec sleep 1000")
    assert ran.returncode == 0, ran.stderr
    executed = host.ctr("task", "exec", "--exec-id", "e1", name, "sh", "-c", "echo executed; exit 4")
    assert (executed.returncode, executed.stdout) == (4, b"executed\n"), executed.stderr
    much = host.ctr("task", "exec", "--exec-id", "e2", name, "head", "-c", "1000000", "/dev/zero")
    assert much.stdout == bytes(1_000_000)
    feed(host, name)
    for verb in ("ps", "metrics", "pause", "resume"):
        done = host.ctr("task", verb, name)
        assert done.returncode == 0, (verb, done.stderr)
    host.stack.ctr("task", "rm", "-f", name, check=True)
    host.stack.ctr("container", "rm", name, check=True)
    assert host.stack.remains() == []


@in_event_loop
async def feed(host: Host, name: str) -> None:
    """Have a process of a container read to the end of its input."""
    with run_dir() as directory:
        stand = ShimStand(directory)
        stand.id, stand.bundle = name, host.bundle(name)
        shim = Shim(stand, await stand.connect())
        out, stdin = Reader(stand, "out"), stand.fifo("in")
        sink = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
        await shim.exec("e3", "/bin/cat", stdin=stdin, stdout=out.path)
        await shim.start("e3")
        os.write(sink, b"fed\n")
        await out.until(b"fed\n")
        os.close(sink)
        await shim.close_io("e3")
        assert await out.all() == b"fed\n"
        assert await shim.wait("e3") == 0
        await shim.delete("e3")
        shim.client.close()
