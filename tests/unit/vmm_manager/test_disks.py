"""What QEMU is told of a disk, and what is no disk."""

from __future__ import annotations

from common.config import BlockAio, QemuConfig
from common.services.vmm import BlockSpec
from procs.vmm_manager.drivers.qemu import disks


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
