"""The kernel, taken out of its self-decompressing wrapper.

QEMU can start an uncompressed ``vmlinux`` directly (PVH, docs of the x86/HVM direct boot ABI): the guest then needs
neither firmware nor the second that decompressing takes under software emulation.

A bzImage, as Documentation/arch/x86/boot.rst describes it, and the fields used here::

    0x1f1  setup_sects     sectors of the real-mode part after the first; the protected-mode part begins behind them
    0x248  payload_offset  of the compressed kernel within the protected-mode part
    0x24c  payload_length  with the four bytes of its uncompressed size, which the build appends

The payload of Debian's kernels is LZ4 in the "legacy" frame format (lz4's doc/lz4_Frame_format.md): a magic number and
blocks of at most 8 MiB uncompressed, each behind its compressed size.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from common.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

_SECTOR = 512
_LZ4_LEGACY_MAGIC = 0x184C2102
_BLOCK_MAX = 8 << 20
_ELF_MAGIC = b"\x7fELF"


def extract_vmlinux(bzimage: bytes, liblz4: Path) -> bytes:
    """Return the ELF file inside a bzImage.

    Args:
        bzimage: the whole file.
        liblz4: Debian's LZ4 library, which is in the image anyway.

    Raises:
        UnsupportedError: the kernel is compressed in another way.
    """
    (setup_sectors,) = struct.unpack_from("<B", bzimage, 0x1F1)
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = (setup_sectors + 1) * _SECTOR + offset
    payload = bzimage[begin : begin + length]
    (size,) = struct.unpack("<I", payload[-4:])
    vmlinux = _decompress(payload[:-4], size, liblz4)
    if not vmlinux.startswith(_ELF_MAGIC):
        raise UnsupportedError("the kernel's payload is not an ELF file")
    return vmlinux


def _decompress(frame: bytes, size: int, liblz4: Path) -> bytes:
    (magic,) = struct.unpack_from("<I", frame)
    if magic != _LZ4_LEGACY_MAGIC:
        raise UnsupportedError(f"the kernel is not compressed with LZ4 (magic {magic:#x})")
    decompress_block = ctypes.CDLL(str(liblz4)).LZ4_decompress_safe
    block = ctypes.create_string_buffer(_BLOCK_MAX)
    blocks: list[bytes] = []
    at = 4
    while at < len(frame):
        (length,) = struct.unpack_from("<I", frame, at)
        at += 4
        filled = decompress_block(frame[at : at + length], block, length, _BLOCK_MAX)
        if filled < 0:
            raise UnsupportedError(f"LZ4 block at {at:#x} of the kernel is damaged")
        blocks.append(block.raw[:filled])
        at += length
    vmlinux = b"".join(blocks)
    if len(vmlinux) != size:
        raise UnsupportedError(f"the kernel unpacks to {len(vmlinux)} bytes and says that it has {size}")
    return vmlinux
