"""The build: which packages, what is up to date, in which order."""

from __future__ import annotations

import fcntl
import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from guest.image import contents, kernel, packages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
_PACKAGES = (
    "crun",
    "libc6",
    "libcap2",
    "libexpat1",
    "libffi8",
    "libgcrypt20",
    "libgpg-error0",
    "liblz4-1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libseccomp2",
    "libsystemd0",
    "libyajl2",
    "libzstd1",
    "python3.11-minimal",
    "zlib1g",
)


class Image(NamedTuple):
    """A built guest."""

    vmlinux: Path
    initrd: Path
    manifest: Path


def build(output: Path, say: Callable[[str], None]) -> Image:
    """Build the guest, as far as it is not built already. Builds of one directory wait for one another.

    Args:
        output: directory of the results and the cache.
        say: takes a line about each step.

    Raises:
        KataError: a package is missing or not as expected.
    """
    output = output.resolve()
    image = Image(output / "vmlinux", output / "initrd.img", output / "manifest.json")
    cache = output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(output / "lock"):
        chosen = _resolve()
        say(f"unpacking {len(chosen)} Debian packages, unless the cache has them")
        root = packages.unpack(chosen, cache)
        if _recorded(image).get("packages") != _versions(chosen):
            say("extracting the kernel")
            image.manifest.unlink(missing_ok=True)
            _replace(image.vmlinux, _vmlinux(root))
        say("composing the initrd")
        initrd = contents.initrd(root)
        if _recorded(image).get("initrd_sha256") != hashlib.sha256(initrd).hexdigest():
            image.manifest.unlink(missing_ok=True)
            _replace(image.initrd, initrd)
            _write_manifest(image, chosen, initrd)
        say(f"{image.vmlinux}: {image.vmlinux.stat().st_size >> 20} MiB")
        say(f"{image.initrd}: {len(initrd) >> 10} KiB")
    return image


def unpacked(output: Path) -> Path:
    """Return the directory of the packages' files that a build left in its cache, or unpack them again.

    Raises:
        KataError: a package is missing.
    """
    with _lock(output / "lock"):
        return packages.unpack(_resolve(), output / "cache")


def _resolve() -> list[packages.Package]:
    return packages.resolve([*_PACKAGES, packages.dependency(_KERNEL_METAPACKAGE, "linux-image-")])


def _vmlinux(root: Path) -> bytes:
    (bzimage,) = root.glob("boot/vmlinuz-*")
    (liblz4,) = root.glob(f"usr/{contents.LIBRARIES}/liblz4.so.1")
    return kernel.extract_vmlinux(bzimage.read_bytes(), liblz4)


def _write_manifest(image: Image, chosen: list[packages.Package], initrd: bytes) -> None:
    manifest = {
        "packages": _versions(chosen),
        "vmlinux_sha256": hashlib.sha256(image.vmlinux.read_bytes()).hexdigest(),
        "initrd_sha256": hashlib.sha256(initrd).hexdigest(),
    }
    _replace(image.manifest, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")


def _recorded(image: Image) -> dict[str, object]:
    """Return the manifest: it was written after kernel and initrd and is removed before them."""
    if not all(path.is_file() for path in image):
        return {}
    recorded: dict[str, object] = json.loads(image.manifest.read_text())
    return recorded


def _versions(chosen: list[packages.Package]) -> dict[str, str]:
    return {package.name: f"{package.version} sha256:{package.sha256}" for package in chosen}


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    half_done = path.with_name(f"{path.name}.part")
    half_done.write_bytes(data)
    half_done.rename(path)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
