"""A host with a working KVM, where there is none: ``python deploy/kvm_host.py -- COMMAND…``, as root.

A Debian kernel booted by QEMU in software emulation, which emulates AMD's virtualization too, with this machine's files
as its own. So it has ``/dev/kvm``, ``/dev/vhost-vsock``, tun and device-mapper that work, whatever the machine has; all
of it is slow, a nested guest boots in the better part of a minute. It is how the tests run on hypervisors that need
KVM (``make test-real-vmm``).

::

    this machine                                the emulated host
    QEMU, TCG          <- virtio-serial --      COMMAND's output, as it comes
    virtiofsd, /       <- virtio-fs -----       its /, written through to this machine's
    a temporary directory                       there: what to run, and how it ended
                                                /tmp, /run, /dev/shm: its own, in memory; but not the current directory

With ``--spare-disk`` that host has an IOMMU too, and an NVMe disk that nobody needs: a guest of it may have that whole.

Kernel and modules are those of the guest image (``make image``), or of the Debian package that ``--kernel`` names, for
what Debian 12's kernel has not, like the Landlock of Linux 6.2. The rest is one busybox; nothing is installed. The
exit status is COMMAND's, or 124 if the time limit passed or the emulated host fell over: then its console's last lines
say why. With two processors, long runs of nested guests were seen to hang it: so it has one unless told otherwise.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import KataError, NotFoundError
from common.testing.spare_disk import SERIAL
from guest.image.build import unpacked
from guest.image.contents import module_files
from guest.image.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parent.parent
GUEST = CHECKOUT / "build/guest"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
BUSYBOX = Path("/bin/busybox")
NO_STATUS = 124

_KERNEL_PARAMETERS = "console=ttyS0 quiet panic=-1 rdinit=/init nohz=off highres=off"
"""A periodic tick: QEMU's emulation of nested guests loses an interrupt now and then, and a host that had set its only
timer by that one never woke again."""

_SILENCE_S = 120
"""How long a guest of the emulated host may print nothing before its KVM counts as broken."""

_MODULES = (
    *("virtio_pci", "virtio_console", "virtiofs", "overlay", "loop", "erofs", "kvm_amd", "vhost_vsock", "vhost_net"),
    *("tun", "veth", "bridge", "dm_mod", "dm_thin_pool", "dm_snapshot", "vfio_pci", "vfio_iommu_type1"),
)
_SPARE_MIB = 64
_APPLETS = ("cat", "chroot", "echo", "insmod", "mkdir", "mount", "poweroff", "sh", "umount")

_INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
mount -t virtiofs host /host || poweroff -f
mkdir -p /job && mount -o bind "/host{work}" /job
mount -t proc proc /host/proc; mount -t sysfs sysfs /host/sys; mount -t devtmpfs devtmpfs /host/dev
mkdir -p /host/dev/pts /host/dev/shm
mount -t devpts devpts /host/dev/pts; mount -t tmpfs shm /host/dev/shm; mount -t tmpfs run /host/run
mount -t cgroup2 cgroup2 /host/sys/fs/cgroup
mkdir -p /cwd && mount -o bind "/host{cwd}" /cwd
mount -t tmpfs tmp /host/tmp
mkdir -p "/host{cwd}" && mount -o bind /cwd "/host{cwd}"
mkdir -p /host/run/kvm-host && mount -o bind /job /host/run/kvm-host
for port in /dev/vport*p1; do :; done
chroot /host /bin/sh /run/kvm-host/script < /dev/null > "$port" 2>&1
echo $? > /job/status
umount /host/run/kvm-host
poweroff -f
"""


class _Kernel(NamedTuple):
    """What is booted.

    Attributes:
        image: an ELF file or a bzImage.
        root: where its modules are below ``lib/modules``.
    """

    image: Path
    root: Path


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Runs a command on an emulated host whose KVM works.")
    parser.add_argument("--memory", type=int, default=6144, metavar="MIB", help="default: %(default)s")
    parser.add_argument("--cpus", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--kernel", type=Path, metavar="DEB", help="a Debian package of another kernel")
    parser.add_argument("--spare-disk", action="store_true", help="with an IOMMU and an NVMe disk that nobody needs")
    parser.add_argument("--timeout", type=int, default=3600, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if not BUSYBOX.exists():
        raise NotFoundError(f"there is no {BUSYBOX}", hint="it is Debian's busybox-static; `make packages` installs it")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvm-host-", dir=_outside_tmp())))
        (work / "script").write_text(_script(arguments.command))
        kernel = _unpack(arguments.kernel, work) if arguments.kernel else _Kernel(GUEST / "vmlinux", unpacked(GUEST))
        _write_initrd(work, kernel)
        files = stack.enter_context(_files(work))
        return _run(work, kernel, files, arguments)


def _unpack(package: Path, work: Path) -> _Kernel:
    """Unpack a kernel's package, and its modules, which newer ones compress.

    Raises:
        NotFoundError: it is no such package.
    """
    root = work / "kernel"
    done = subprocess.run(["/usr/bin/dpkg-deb", "-x", package, root], capture_output=True, text=True, check=False)
    image = next(root.glob("boot/vmlinuz-*"), None)
    if image is None:
        raise NotFoundError(f"{package} is no Debian package of a kernel: {done.stderr.strip() or 'no boot/vmlinuz-*'}")
    for file in root.glob("**/*.ko.xz"):
        file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
    return _Kernel(image, root)


def _outside_tmp() -> str:
    """Return where a directory may be that the emulated host sees: its /tmp is its own before it looks there."""
    return str(CHECKOUT / "build")


def _script(command: list[str]) -> str:
    """Return what is run: the command, in this directory and with our environment."""
    variables = (f"export {name}={shlex.quote(value)}" for name, value in os.environ.items() if name.isidentifier())
    here = shlex.quote(str(Path.cwd()))
    patience = f"export PYKATA_PROBE_SILENCE_S={_SILENCE_S}"
    return "\n".join([*variables, patience, "ip link set lo up", f"cd {here}", f"exec {shlex.join(command)}\n"])


def _write_initrd(work: Path, kernel: _Kernel) -> None:
    archive = Archive()
    archive.add_file("/init", _INIT.format(work=work, cwd=Path.cwd()).encode(), 0o755)
    archive.add_file("/bin/busybox", BUSYBOX.read_bytes(), 0o755)
    for applet in _APPLETS:
        archive.add_link(f"/bin/{applet}", "busybox")
    for directory in ("/dev", "/proc", "/sys", "/host"):
        archive.add_directory(directory)
    lists = kernel.root.glob("lib/modules/*/modules.builtin")
    built_in = {Path(line).stem for file in lists for line in file.read_text().split()}
    files = module_files(kernel.root, [name for name in _MODULES if name not in built_in])
    archive.add_file("/modules/order", "".join(f"{file.name}\n" for file in files).encode())
    for file in files:
        archive.add_file(f"/modules/{file.name}", file.read_bytes())
    (work / "initrd").write_bytes(archive.encode())


@contextmanager
def _files(work: Path) -> Iterator[Path]:
    """Serve this machine's files on a socket that listens already; end that at the end."""
    path = work / "files"
    options = ("source=/", "sandbox=chroot", "cache=auto", "xattr")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [VIRTIOFSD, f"--fd={listener.fileno()}", *(word for option in options for word in ("-o", option))]
        daemon = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        yield path
    finally:
        daemon.kill()
        daemon.wait()


def _run(work: Path, kernel: _Kernel, files: Path, arguments: argparse.Namespace) -> int:
    ram = f"memory-backend-memfd,id=ram,size={arguments.memory}M,share=on"
    command = [
        *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),  # it ends with us, however that is
        *("-machine", "q35,memory-backend=ram", "-object", ram, "-m", str(arguments.memory)),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(arguments.cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{work}/console"),
        *("-kernel", str(kernel.image), "-initrd", str(work / "initrd")),
        *("-append", f"{_KERNEL_PARAMETERS} {'intel_iommu=on' if arguments.spare_disk else ''}"),
        *("-chardev", f"socket,id=files,path={files}", "-device", "vhost-user-fs-pci,chardev=files,tag=host"),
        *("-device", "virtio-serial-pci", "-chardev", "stdio,id=output,signal=off"),
        *("-device", "virtserialport,chardev=output,name=output"),
        *(_spare_disk(work) if arguments.spare_disk else ()),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as qemu:  # at the end of its input it closes the port
        try:
            qemu.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            qemu.kill()
    status = work / "status"
    if status.exists():
        return int(status.read_text())
    console = (work / "console").read_text(errors="replace").splitlines()[-15:]
    why = "kvm-host: no exit status: the time limit passed, or it fell over. Its console:"
    print(why, *console, sep="\n  ", file=sys.stderr)
    return NO_STATUS


def _spare_disk(work: Path) -> list[str]:
    """Return QEMU's arguments for the disk, and for the IOMMU that it is behind.

    Without remapping of interrupts Linux lends no device (``vfio_iommu_type1_attach_group``).
    """
    file = work / "spare"
    file.touch()
    os.truncate(file, _SPARE_MIB << 20)
    return [
        *("-device", "intel-iommu,intremap=on,aw-bits=48"),
        *("-drive", f"file={file},format=raw,if=none,id=spare", "-device", f"nvme,serial={SERIAL},drive=spare"),
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KataError, OSError) as err:
        sys.exit(f"kvm-host: {err}")
