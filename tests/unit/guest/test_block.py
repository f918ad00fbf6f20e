"""Where the agent looks for a disk, in a directory that looks like a kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest.agent import block
from guest.agent.rpc import RpcError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(block, "_DEVICES", str(tmp_path))
    for device in ("pci0000:00/0000:00:05.0", "pci0000:00/0000:00:04.0/0000:01:01.0", "pci0001:00/0001:00:05.0"):
        (tmp_path / device / "virtio3/block/null").mkdir(parents=True)
    return tmp_path


def test_a_path_is_of_the_first_segment_unless_it_names_another(sysfs: Path) -> None:
    for path in ("05", "04/01", "0001:05", "1:5.0"):
        assert block.find_by_pci_path(path, "") == "/dev/null"
    (sysfs / "pci0001:00").rename(sysfs / "elsewhere")
    assert block.find_by_pci_path("05", "") == "/dev/null"
    assert block.find_by_pci_path("0001:05", "") is None


@pytest.mark.parametrize("path", ["", "x", "0001:", "y:05", "0001:02:05", "05/z"])
@pytest.mark.usefixtures("sysfs")
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(RpcError, match="is not a PCI path"):
        block.find_by_pci_path(path, "")
