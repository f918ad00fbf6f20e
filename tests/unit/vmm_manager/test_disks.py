"""What QEMU is told of a disk, and what is no disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.config import BlockAio, QemuConfig
from common.errors import KataError, NotFoundError, UsageError
from common.services.vmm import BlockSpec
from procs.vmm_manager.drivers.qemu import disks

if TYPE_CHECKING:
    from pathlib import Path


def node(*, is_read_only: bool = False, **config: object) -> dict[str, object]:
    spec = BlockSpec(source="/images/a", is_read_only=is_read_only)
    return disks.node("disk-1", spec, "file", QemuConfig(**config))  # type: ignore[arg-type]


def test_a_disk_is_raw_and_gives_back_what_the_guest_discards() -> None:
    assert node() == {
        "driver": "raw",
        "node-name": "disk-1",
        "read-only": False,
        "discard": "unmap",
        "file": {"driver": "file", "filename": "/images/a", "aio": "io_uring"},
    }


def test_the_configuration_chooses_how_the_host_reads_and_caches() -> None:
    assert node(block_device_aio=BlockAio.THREADS)["file"] == {
        "driver": "file",
        "filename": "/images/a",
        "aio": "threads",
    }
    cached = node(block_device_cache_set=True, block_device_cache_direct=True)
    assert cached["cache"] == {"direct": True, "no-flush": False}
    assert "cache" not in node(block_device_cache_direct=True), "which only counts if cache options are set at all"


def test_a_read_only_disk_is_opened_for_reading() -> None:
    assert node(is_read_only=True)["read-only"] is True


def test_the_kind_of_file_decides_who_opens_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    assert disks._protocol(str(image)) == "file"
    link = tmp_path / "link"
    link.symlink_to(image)
    assert disks._protocol(str(link)) == "file", "as a device mapper's names are links"


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("/no/such/image", NotFoundError, "does not exist"),
        ("image", UsageError, "not an absolute path"),
        ("/", UsageError, "neither a regular file nor a block device"),
        ("/dev/null", UsageError, "neither a regular file nor a block device"),
    ],
)
def test_what_is_no_disk_is_refused(source: str, kind: type[KataError], said: str) -> None:
    with pytest.raises(kind, match=said):
        disks._protocol(source)


def test_an_empty_file_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(UsageError, match="has 0 bytes"):
        disks._protocol(str(tmp_path / "image"))
