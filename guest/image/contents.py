"""What the initrd holds, found in the unpacked packages."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import guest.agent
from common.errors import NotFoundError
from guest.image.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIBRARIES = "lib/x86_64-linux-gnu"
_LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
_PYTHON = "usr/bin/python3.11"
_STANDARD_LIBRARY = "usr/lib/python3.11"
_CRUN = "usr/bin/crun"

_MODULES_AT_BOOT = ("virtio_pci", "virtio_console", "virtiofs")
"""Kernel modules that every guest loads."""

_MODULES_ON_DEMAND = {
    "blk": ("virtio_blk",),
    "scsi": ("virtio_scsi", "sd_mod"),
    "erofs": ("erofs",),
    "mem": ("virtio_mem",),
    "mmio": ("virtio_mmio",),
    "net": ("virtio_net",),
    "overlay": ("overlay",),
    "pci-0100": ("virtio_blk",),
    "pci-0200": ("virtio_net", "ixgbevf"),
    "pmem": ("virtio_pmem", "nd_pmem"),
    "vsock": ("vsock",),
    "vsock-device": ("vmw_vsock_virtio_transport",),
    "xfs": ("xfs",),
}
"""Kernel modules by what the agent loads them for: a kind of device, a type of file system, or a class of the devices
that a guest has of the host. ext4 is in the kernel, and so is the driver of NVMe."""

_INIT = b"""#!/usr/bin/python3.11 -ISE
import gc, sys
gc.disable()
sys.path[:] = "/usr/lib/kata-agent", "/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload"
from guest.agent.main import main
main()
"""
"""Nothing that a boot makes is garbage; ``main`` turns the collector on when it has made all."""

# A line of `ld.so --list`: "\tlibc.so.6 => PATH (0x...)", or "=> not found"
_NEEDED = re.compile(r"^\t(?P<name>[^\s/]+) => (?P<path>\S+)", re.MULTILINE)
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_INFO_SIZE = 12
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def initrd(root: Path) -> bytes:
    """Return the initrd's bytes.

    Args:
        root: the unpacked packages.
    """
    archive = Archive()
    archive.add_file("/init", _INIT, 0o755)
    for directory in ("/dev", "/proc", "/run", "/sys"):
        archive.add_directory(directory)
    _add_modules(archive, root)
    _add_python(archive, root)
    for executable in (_PYTHON, _CRUN):
        archive.add_file(f"/{executable}", (root / executable).read_bytes(), 0o755)
        _add_libraries(archive, root, root / executable)
    # The files by which Python knows where its library is (Modules/getpath.py); `os` itself is frozen into it.
    archive.add_file(f"/{_STANDARD_LIBRARY}/os.pyc", b"")
    archive.add_directory(f"/{_STANDARD_LIBRARY}/lib-dynload")
    archive.add_file("/lib64/ld-linux-x86-64.so.2", (root / _LOADER).read_bytes(), 0o755)
    return archive.encode()


def _add_modules(archive: Archive, root: Path) -> None:
    """Add the kernel's modules and, per purpose, the order in which to load them."""
    found = _modules(root)
    always = _load_order(_MODULES_AT_BOOT, found)
    _add_list(archive, "boot", (f"{name}.ko" for name in always))
    for name in always:
        archive.add_file(f"/lib/modules/{name}.ko", without_signature(found[name].read_bytes()))
    for purpose, names in _MODULES_ON_DEMAND.items():
        order = [name for name in _load_order(names, found) if name not in always]
        _add_list(archive, purpose, (f"{name}.ko.z" for name in order))
        for name in order:
            archive.add_file(f"/lib/modules/{name}.ko.z", zlib.compress(without_signature(found[name].read_bytes())))


def module_files(root: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of kernel modules and of what they need, in the order in which they are to be loaded.

    Raises:
        NotFoundError: the kernel's package has no such module.
    """
    found = _modules(root)
    return [found[name] for name in _load_order(names, found)]


def _modules(root: Path) -> dict[str, Path]:
    return {_module_name(path.stem): path for path in root.glob("lib/modules/*/kernel/**/*.ko")}


def _module_name(name: str) -> str:
    """Return a module's one name: files and dependencies may have dashes where the kernel has underscores."""
    return name.replace("-", "_")


def _load_order(names: Iterable[str], found: dict[str, Path]) -> list[str]:
    """Return modules and what they need, each behind what it needs itself."""
    return list(dict.fromkeys(module for name in names for module in _with_dependencies(name, found)))


def _add_list(archive: Archive, purpose: str, files: Iterable[str]) -> None:
    archive.add_file(f"/lib/modules/{purpose}", "\n".join(files).encode())


def without_signature(module: bytes) -> bytes:
    """Return a module without the signature behind it, which takes the guest 10 ms to verify.

    Whoever could replace a module in the initrd could replace the agent. The end of a signed module is
    ``struct module_signature``, whose last field is the signature's length, and a magic string
    (include/linux/module_signature.h).
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC)
    (length,) = struct.unpack_from(">I", module, end - 4)
    return module[: end - _SIGNATURE_INFO_SIZE - length]


def _with_dependencies(name: str, found: dict[str, Path]) -> Iterator[str]:
    """Yield a module behind those that it needs."""
    if name not in found:
        raise NotFoundError(f"the kernel's package has no module {name}")
    depends = _DEPENDS.search(found[name].read_bytes())
    for needed in depends[1].decode().split(",") if depends else ():
        if needed:
            yield from _with_dependencies(_module_name(needed), found)
    yield name


def _add_python(archive: Archive, root: Path) -> None:
    """Add every module that the agent imports, and the shared libraries of those that are not Python."""
    ours = Path(guest.agent.__file__).parent
    modules = [f"guest.agent.{path.stem}" for path in sorted(ours.glob("[a-z]*.py"))]
    script = Path(__file__).with_name("python_closure.py")
    with tempfile.TemporaryDirectory() as output:
        _run_in(
            root, _PYTHON, "-ISE", str(script), output, str(root / _STANDARD_LIBRARY), str(ours.parents[1]), *modules
        )
        for path in sorted(Path(output).rglob("*.*")):
            if path.is_file():
                archive.add_file(f"/{path.relative_to(output)}", path.read_bytes())
            if path.suffix == ".so":
                _add_libraries(archive, root, path)


def _add_libraries(archive: Archive, root: Path, executable: Path) -> None:
    """Add the shared libraries that an executable or library needs, where the loader looks for them."""
    for needed in _NEEDED.finditer(_run_in(root, "--list", str(executable))):
        if needed["path"] == "not":
            raise NotFoundError(f"no package of the image has {needed['name']}, which {executable.name} needs")
        if needed["path"].startswith(str(root)):
            archive.add_file(f"/{LIBRARIES}/{needed['name']}", Path(needed["path"]).read_bytes())


def _run_in(root: Path, *arguments: str) -> str:
    """Run the loader of the unpacked packages: what it starts finds its libraries there and nowhere else."""
    library_path = ":".join(str(root / directory) for directory in (LIBRARIES, f"usr/{LIBRARIES}"))
    command = [str(root / _LOADER), "--inhibit-cache", "--library-path", library_path, *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotFoundError(f"`{' '.join(arguments)}` failed in the image: {done.stderr.strip()}")
    return done.stdout
