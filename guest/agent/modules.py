"""Kernel modules, by what they are needed for: ``/lib/modules/<purpose>`` lists them in the order of loading.

What every guest needs lies there as the kernel takes it. What only some need is compressed (``.ko.z``, RFC 1950):
unpacking the initrd takes 10 ms of each boot per megabyte.
"""

from __future__ import annotations

import errno

from guest.agent import kernel
from guest.agent.files import read_bytes, read_text

DIRECTORY = "/lib/modules"

_loaded: set[str] = set()


def load(purpose: str) -> None:
    """Load what is needed for a purpose, once; one that the image does not know needs nothing.

    Raises:
        OSError: the kernel takes a module not.
    """
    if not purpose or purpose in _loaded or "/" in purpose:
        return
    for file in read_text(f"{DIRECTORY}/{purpose}").split():
        _load_file(f"{DIRECTORY}/{file}")
    _loaded.add(purpose)


def _load_file(path: str) -> None:
    try:
        if path.endswith(".z"):
            import zlib

            kernel.load_module_image(zlib.decompress(read_bytes(path)))
        else:
            kernel.load_module(path)
    except OSError as err:
        if err.errno != errno.EEXIST:  # another purpose needs it too
            raise
