"""What may be a disk's source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, NotFoundError, UsageError
from procs.vmm_manager.drivers.sources import is_block_device

if TYPE_CHECKING:
    from pathlib import Path


def test_the_kind_of_file_decides_who_opens_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    assert not is_block_device(str(image))
    link = tmp_path / "link"
    link.symlink_to(image)
    assert not is_block_device(str(link)), "as a device mapper's names are links"


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
        is_block_device(source)


def test_an_empty_file_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(UsageError, match="has 0 bytes"):
        is_block_device(str(tmp_path / "image"))
