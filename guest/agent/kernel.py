"""System calls that Python does not wrap, through libc.

``_ctypes`` and not ``ctypes``: the C half of that module can call a function, and importing the Python half would take
40 ms of every boot under software emulation.
"""

from __future__ import annotations

import _ctypes
import posix

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_REMOUNT = 32
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 4096, 8192, 16384, 1 << 18
MNT_DETACH = 2
_SYS_INIT_MODULE, _SYS_FINIT_MODULE = 175, 313
"""Numbers of init_module(2) and finit_module(2) on x86-64, for which libc has no functions."""


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001  # what ctypes.c_int is
    _type_ = "i"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None is the program itself, as for dlopen(3)


def _function(name: str) -> _Function:
    return _Function(_ctypes.dlsym(_libc, name))


_mount = _function("mount")
_umount2 = _function("umount2")
_syscall = _function("syscall")


def _check(result: int, what: str) -> None:
    if result == -1:
        code = _ctypes.get_errno()
        raise OSError(code, posix.strerror(code), what)


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system.

    Raises:
        OSError: as mount(2) fails; the file name is the target.
    """
    _check(_mount(source.encode(), target.encode(), fstype.encode(), flags, options.encode()), target)


def unmount(target: str, flags: int = 0) -> None:
    """Unmount; with ``MNT_DETACH``, detach now and clean up when it is no longer busy.

    Raises:
        OSError: as umount2(2) fails.
    """
    _check(_umount2(target.encode(), flags), target)


def load_module_image(image: bytes, parameters: str = "") -> None:
    """Load a kernel module from memory.

    Raises:
        OSError: as init_module(2) fails.
    """
    _check(_syscall(_SYS_INIT_MODULE, image, len(image), parameters.encode()), "module")


def load_module(path: str) -> None:
    """Load a kernel module from its file.

    Raises:
        OSError: as finit_module(2) fails.
    """
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        _check(_syscall(_SYS_FINIT_MODULE, descriptor, b"", 0), path)
    finally:
        posix.close(descriptor)
