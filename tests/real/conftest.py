"""Real hypervisors with devices that only a real host has. Run by ``make test-real-vmm``, else not collected."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.real_vmms import REAL
from common.testing.spare_disk import spare_disk
from common.testing.thin_pool import ThinPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

collect_ignore_glob = [] if "clh-real" in REAL else ["test_[!mv]*.py" if REAL else "test_[!v]*.py"]
if spare_disk() is None:  # it is not the emulated host
    collect_ignore_glob += ["test_vfio.py", "test_vsock.py"]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ThinPool]:
    """A thin pool whose disks have busybox on them."""
    content = tmp_path / "content" / "rootfs"
    make_busybox_rootfs(content)
    with ThinPool(tmp_path, "16M", content) as thin:
        yield thin
    left = subprocess.run(["/sbin/dmsetup", "ls"], capture_output=True, text=True, check=True).stdout
    assert thin.name not in left
