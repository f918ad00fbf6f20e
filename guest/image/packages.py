"""Debian packages: which versions apt would install, and their files unpacked in a cache of ours.

apt knows the mirrors, the proxy and the archive's keys of this machine; we only ask it. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# A line of `apt-get --print-uris download`: 'URI' FILE SIZE SHA256:HASH
_URI_LINE = re.compile(
    r"^'[^']+' (?P<file>(?P<name>[^_ ]+)_(?P<version>[^_ ]+)_\S+) \d+ SHA256:(?P<sha256>\w+)$", re.MULTILINE
)


class Package(NamedTuple):
    """A package as the archive has it; ``sha256`` is its identity."""

    name: str
    version: str
    file: str
    sha256: str


def resolve(names: Iterable[str]) -> list[Package]:
    """Return what apt would install for each name, sorted by name.

    Raises:
        UnavailableError: apt does not know one of them.
    """
    listing = _run("apt-get", "--print-uris", "download", *names)
    return sorted(
        Package(line["name"], line["version"].replace("%3a", ":"), line["file"], line["sha256"])
        for line in _URI_LINE.finditer(listing)
    )


def dependency(name: str, prefix: str) -> str:
    """Return the dependency of a package whose name begins with ``prefix``: what a metapackage stands for.

    Raises:
        UnavailableError: apt does not know the package, or it has no such dependency.
    """
    fields = _run("apt-cache", "show", "--no-all-versions", name)
    found = re.search(rf"^Depends:.*?\b({re.escape(prefix)}\S+)", fields, re.MULTILINE)
    if found is None:
        raise UnavailableError(f"package {name} depends on no {prefix}*")
    return found[1]


def unpack(packages: Iterable[Package], cache: Path) -> Path:
    """Return a directory that holds the packages' files; download and unpack what the cache has not.

    Raises:
        UnavailableError: one could not be downloaded.
    """
    packages = list(packages)
    key = hashlib.sha256("".join(package.sha256 for package in packages).encode()).hexdigest()
    root = cache / f"root-{key[:16]}"
    if root.is_dir():
        return root
    half_done = cache / f"{root.name}.part"
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    for package in packages:
        _run("dpkg-deb", "-x", str(_download(package, cache)), str(half_done))
    half_done.rename(root)
    return root


def _download(package: Package, cache: Path) -> Path:
    """Return the package's archive, whose content apt has verified."""
    archive = cache / package.file
    if not archive.is_file():
        # apt would download as a user of its own, who may not write here.
        name = f"{package.name}={package.version}"
        _run("apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", name, cwd=cache)
    return archive


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}",
            hint="`apt-get update` renews the list of packages; see /etc/apt/sources.list.d",
        )
    return done.stdout
