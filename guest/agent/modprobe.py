"""Modules for the kernel that the host asks for by name, as modprobe(8) loads them. Imported when it does.

They are those of the image (:mod:`guest.agent.modules`); what a module needs is written in it.
"""

from __future__ import annotations

import posix

from common import status
from guest.agent import kernel
from guest.agent.files import has_file, read_bytes
from guest.agent.log import log
from guest.agent.modules import DIRECTORY
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from common.protocols.agent import KernelModule

_DEPENDS = b"\0depends="
"""Names that follow are separated by commas and end with a zero byte (the section ``.modinfo``)."""


def load(wanted: list[KernelModule]) -> None:
    """Load modules, each behind what it needs. One that the kernel has already stays as it is.

    Raises:
        RpcError: the image has no such module, or the kernel does not take it with these parameters.
    """
    files = {_name(file.partition(".ko")[0]): file for file in posix.listdir(DIRECTORY) if ".ko" in file}
    for module in wanted:
        _load(_name(module.name), " ".join(module.parameters), files)


def _load(name: str, parameters: str, files: dict[str, str]) -> None:
    if has_file(f"/sys/module/{name}"):
        return
    if name not in files:
        raise RpcError(status.NOT_FOUND, f"the guest's image has no kernel module {name}")
    image = _image(f"{DIRECTORY}/{files[name]}")
    for needed in _needs(image):
        _load(needed, "", files)
    try:
        kernel.load_module_image(image, parameters)
    except OSError as err:
        raise RpcError(
            status.INVALID_ARGUMENT, f"kernel module {name} with parameters {parameters!r}: {err.strerror}"
        ) from err
    log("info", "kernel module loaded", module=name, parameters=parameters)


def _image(path: str) -> bytes:
    if not path.endswith(".z"):
        return read_bytes(path)
    import zlib

    return zlib.decompress(read_bytes(path))


def _needs(image: bytes) -> list[str]:
    names = image.partition(_DEPENDS)[2].partition(b"\0")[0].decode()
    return [_name(name) for name in names.split(",") if name]


def _name(module: str) -> str:
    """Return a module's one name: files and dependencies may have dashes where the kernel has underscores."""
    return module.replace("-", "_")
