"""A root file system of layers: mounts of which the last is made of those before it.

containerd 2.2 and newer describe such a root file system by a template, and leave it to a runtime that says so
(``procs.shim.introspection``) to fill it in. The erofs snapshotter makes them, here with ``default_size``::

    ext4                 /…/rwlayer.img     rw loop
    erofs                /…/1/layer.erofs   ro loop                       one for each layer, the uppermost first
    erofs                /…/2/layer.erofs   ro loop
    format/mkdir/overlay overlay            X-containerd.mkdir.path={{ mount 0 }}/upper:0755
                                            X-containerd.mkdir.path={{ mount 0 }}/work:0755
                                            upperdir={{ mount 0 }}/upper workdir={{ mount 0 }}/work
                                            lowerdir={{ overlay 1 2 }}

Without it the first one is missing, and ``upperdir`` and ``workdir`` are directories of the host. ``{{ mount 0 }}`` is
where the mount of that number is mounted, ``{{ overlay 1 2 }}`` are several such places in the form of a ``lowerdir``.

Source: containerd 2.3, docs/mounts.md and core/mount/manager (format.go, mkdir.go).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import UnsupportedError, UsageError
from common.protocols.task import Mount

if TYPE_CHECKING:
    from collections.abc import Sequence

ALLOWED_MOUNTS = "erofs,format/*,mkdir/*"
"""What containerd is to leave to us: the layers, and both transformations of the mount that joins them."""

DIRECTORY_MODE = 0o755

_TRANSFORMATIONS = frozenset(("format", "mkdir"))
_MKDIR = "X-containerd.mkdir.path="
_CONTAINERDS = "X-containerd."
"""How options begin that are not for a file system but for containerd's mount manager."""

_TEMPLATE = re.compile(r"\{\{ *(?:mount +(?P<one>\d+)|overlay +(?P<first>\d+) +(?P<last>\d+)) *\}\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A root file system of layers.

    Attributes:
        below: the mounts that it is made of, by number.
        top: the mount that makes it.
        directories: what has to be made for that first, with mode 0755.
    """

    below: tuple[Mount, ...]
    top: Mount
    directories: tuple[str, ...]

    def at(self, places: Sequence[str]) -> Layers:
        """Return it with the templates filled in, when what is below is mounted at these places.

        Raises:
            UsageError: a template names a mount that there is not.
        """
        top = Mount(
            type=self.top.type,
            source=_filled(self.top.source, places),
            target="",
            options=[_filled(option, places) for option in self.top.options],
        )
        directories = tuple(_filled(path, places) for path in self.directories)
        return Layers(below=self.below, top=top, directories=directories)


def of(rootfs: Sequence[Mount]) -> Layers | None:
    """Return the layers that mounts describe, or None if each of them is complete.

    Raises:
        UnsupportedError: they ask for what only containerd's mount manager does.
    """
    if not rootfs:
        return None
    *below, last = rootfs
    *transformations, fstype = last.type.split("/")
    for option in (*(option for mount in below for option in mount.options), *last.options):
        if option.startswith(_CONTAINERDS) and not option.startswith(_MKDIR):
            raise UnsupportedError(
                f"mount option {option!r} of the root file system is not supported",
                hint='for dm-verity: set `dmverity_mode = "off"` for containerd\'s erofs snapshotter',
            )
    if not _TRANSFORMATIONS.issuperset(transformations) or any("/" in mount.type for mount in below):
        raise UnsupportedError(f"mounts {[mount.type for mount in rootfs]} of a root file system are not supported")
    if not transformations:
        return None
    return Layers(
        below=tuple(below),
        top=Mount(type=fstype, source=last.source, target="", options=_without_directories(last.options)),
        directories=tuple(_directory(option) for option in last.options if option.startswith(_MKDIR)),
    )


def _without_directories(options: Sequence[str]) -> list[str]:
    return [option for option in options if not option.startswith(_MKDIR)]


def _directory(option: str) -> str:
    path, _, rest = option.removeprefix(_MKDIR).rpartition(":")
    if rest != f"0{DIRECTORY_MODE:o}":
        raise UnsupportedError(f"mount option {option!r} of the root file system: only mode 0755 is supported")
    return path


def _filled(text: str, places: Sequence[str]) -> str:
    def place(match: re.Match[str]) -> str:
        if match["one"]:
            return places[int(match["one"])]
        first, last = int(match["first"]), int(match["last"])
        wanted = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return ":".join(places[number] for number in wanted)

    try:
        filled = _TEMPLATE.sub(place, text)
    except IndexError as err:
        raise UsageError(f"template {text!r} of the root file system: there are {len(places)} mounts before") from err
    if "{{" in filled:
        raise UnsupportedError(f"template {text!r} of the root file system is not supported")
    return filled
