"""The image builder's own formats; what the image does is tested in virtual machines."""

from __future__ import annotations

import os
import struct
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from common.errors import NotFoundError, UnsupportedError
from guest.agent.health import VERSION
from guest.image import kernel
from guest.image.contents import module_files, without_signature
from guest.image.cpio import Archive

LIBLZ4 = Path("/usr/lib/x86_64-linux-gnu/liblz4.so.1")


def archive() -> Archive:
    made = Archive()
    made.add_file("/usr/bin/run", b"#!x\n", 0o755)
    made.add_file("/etc/empty", b"")
    made.add_link("/bin", "usr/bin")
    return made


def test_cpio_reads_our_archive(tmp_path: Path) -> None:
    subprocess.run(["/usr/bin/cpio", "-i", "--quiet"], input=archive().encode(), cwd=tmp_path, check=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "bin", "etc", "etc/empty", "usr", "usr/bin", "usr/bin/run",
    ]  # fmt: skip
    assert (tmp_path / "usr/bin/run").read_bytes() == b"#!x\n"
    assert os.access(tmp_path / "usr/bin/run", os.X_OK)
    assert (tmp_path / "bin").readlink() == Path("usr/bin")


def test_an_archive_depends_on_its_entries_alone() -> None:
    other = Archive()
    other.add_link("/bin", "usr/bin")
    other.add_file("/etc/empty", b"")
    other.add_file("/usr/bin/run", b"#!x\n", 0o755)
    assert other.encode() == archive().encode()


def bzimage(payload: bytes, size: int) -> bytes:
    """A file with the fields of a bzImage that are read: one setup sector, the payload 16 bytes behind it."""
    image = bytearray(2 * 512 + 16)
    struct.pack_into("<B", image, 0x1F1, 1)
    struct.pack_into("<II", image, 0x248, 16, len(payload) + 4)
    return bytes(image) + payload + struct.pack("<I", size)


def lz4_legacy(*blocks: bytes) -> bytes:
    """LZ4 without compression: each block one sequence of literals, at most 14 of them."""
    sequences = [bytes([len(block) << 4]) + block for block in blocks]
    return struct.pack("<I", 0x184C2102) + b"".join(struct.pack("<I", len(it)) + it for it in sequences)


def test_the_kernel_is_found_and_unpacked() -> None:
    payload = lz4_legacy(b"\x7fELF and", b" the rest")
    assert kernel.extract_vmlinux(bzimage(payload, 17), LIBLZ4) == b"\x7fELF and the rest"


@pytest.mark.parametrize(
    ("payload", "size", "said"),
    [
        (lz4_legacy(b"\x7fELF"), 5, "unpacks to 4 bytes and says that it has 5"),
        (lz4_legacy(b"MZ"), 2, "not an ELF file"),
        (b"\x1f\x8b\x08\0", 4, "not compressed with LZ4"),
        (struct.pack("<II", 0x184C2102, 2) + b"\xf0\0", 4, "LZ4 block at 0x8 of the kernel is damaged"),
    ],
)
def test_another_kernel_is_refused(payload: bytes, size: int, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        kernel.extract_vmlinux(bzimage(payload, size), LIBLZ4)


def test_a_module_loses_its_signature_and_nothing_else() -> None:
    module = b"\x7fELF module"
    info = struct.pack(">8xI", 5)
    assert without_signature(module + b"PKCS7" + info + b"~Module signature appended~\n") == module
    assert without_signature(module) == module


def test_the_agent_has_the_distributions_version() -> None:
    assert version("pykata") == VERSION


def test_modules_come_behind_what_they_need_whichever_way_they_are_spelt(tmp_path: Path) -> None:
    for file, needed in {"kvm-amd": "kvm,dm-x", "kvm": "", "dm-x": "dm_y", "dm_y": "", "other": ""}.items():
        path = tmp_path / f"lib/modules/6.1/kernel/drivers/{file}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0depends=" + needed.encode() + b"\0")
    assert [path.stem for path in module_files(tmp_path, ["kvm_amd", "kvm"])] == ["kvm", "dm_y", "dm-x", "kvm-amd"]
    with pytest.raises(NotFoundError, match="no module nowhere"):
        module_files(tmp_path, ["nowhere"])
