"""A VM with the VM manager's own command line, and nothing else of ours on the host.

What it boots is the guest image as it is, or the image with a script of the benchmark in place of the agent: an initrd
may be several cpio archives one behind the other (Documentation/driver-api/early-userspace/buffer-format.rst), so the
script and its files come in a second one and ``rdinit=`` names the script.
"""

from __future__ import annotations

import json
import py_compile
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import QemuConfig
from common.testing.stack import GUEST
from guest.image.cpio import Archive
from procs.vmm_manager.drivers.qemu.channel import SerialDevice
from procs.vmm_manager.drivers.qemu.cmdline import CONSOLE, CONSOLE_SIZE, QMP_SOCKET, QemuCommand
from procs.vmm_manager.drivers.spawn import connect, listening

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_TIMEOUT_S = 120
"""Until an answer: a limit for a loaded machine, not a measure of anything."""

BARE_NAME = "bare"

_MEMORY_MIB = 512
"""What the stack's configuration gives a VM, so that all VMs are alike."""

_INIT = """#!/usr/bin/python3.11 -ISE
import gc, sys
gc.disable()
sys.path[:] = "/bench", "/usr/lib/kata-agent", "/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload"
from {script} import main
main()
"""


class BareVm:
    """A running VM.

    Args:
        directory: where its sockets are.
        monitor: a connection to QEMU's monitor.
    """

    def __init__(self, directory: str, monitor: socket.socket) -> None:
        self._directory = directory
        self._monitor = monitor.makefile("rw")

    def wait_started(self) -> None:
        """Return when QEMU greets: it has set up the machine, all its sockets are there.

        Raises:
            RuntimeError: it has ended instead, and said why on standard error.
        """
        if not self._monitor.readline():
            raise RuntimeError("QEMU did not start")

    def connect(self, name: str) -> socket.socket:
        """Connect to one of QEMU's sockets."""
        connection = connect(self._directory, name)
        connection.settimeout(_TIMEOUT_S)
        return connection

    def console(self) -> str:
        """Return what the guest has printed; once, since it is taken out of QEMU's buffer."""
        self._execute("qmp_capabilities")
        return str(self._execute("ringbuf-read", device=CONSOLE, size=CONSOLE_SIZE))

    def close(self) -> None:
        """Give up the monitor."""
        self._monitor.close()

    def _execute(self, command: str, **arguments: object) -> object:
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        answer: dict[str, object] = {}
        while "return" not in answer:  # events come in between
            answer = json.loads(self._monitor.readline())
        return answer["return"]


@contextmanager
def bare_vm(accelerator: str, *, script: str = "", archive: Archive | None = None) -> Iterator[BareVm]:
    """Boot a VM; QEMU is killed at the end.

    Args:
        accelerator: ``kvm`` or ``tcg``.
        script: a module of the benchmark that runs in the guest instead of the agent; empty for the agent.
        archive: what the script needs in the guest.
    """
    with ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="kt-", dir="/tmp"))
        config = _config(directory, script, archive or Archive())
        with listening(directory, QMP_SOCKET) as listener:
            fd = listener.fileno()
            command = QemuCommand(
                sandbox_id=BARE_NAME, config=config, accelerator=accelerator, qmp_fd=fd, channel=SerialDevice()
            ).argv()
            command = ["setpriv", "--pdeathsig", "KILL", *command]  # it ends with us, however that is
            process = undo.enter_context(
                subprocess.Popen(command, cwd=directory, pass_fds=[fd], stdin=subprocess.DEVNULL)
            )
        undo.callback(process.kill)
        monitor = undo.enter_context(connect(directory, QMP_SOCKET))
        monitor.settimeout(_TIMEOUT_S)
        vm = BareVm(directory, monitor)
        undo.callback(vm.close)
        vm.wait_started()
        yield vm


def _config(directory: str, script: str, archive: Archive) -> QemuConfig:
    initrd, parameters = GUEST / "initrd.img", ""
    if script:
        archive.add_file("/bench/init", _INIT.format(script=script).encode(), 0o755)
        archive.add_file(f"/bench/{script}.pyc", _compiled(Path(__file__).with_name(f"{script}.py")))
        image = initrd.read_bytes()
        initrd, parameters = Path(directory, "initrd.img"), "rdinit=/bench/init"
        initrd.write_bytes(image + archive.encode())
    return QemuConfig(
        kernel=str(GUEST / "vmlinux"), initrd=str(initrd), default_memory=_MEMORY_MIB, kernel_params=parameters
    )


def _compiled(source: Path) -> bytes:
    """Compile for the guest, whose trimmed library cannot: it has the same Python as Debian's host."""
    with tempfile.NamedTemporaryFile(suffix=".pyc") as target:
        py_compile.compile(
            str(source), target.name, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
        return Path(target.name).read_bytes()
