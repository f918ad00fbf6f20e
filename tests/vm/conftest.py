"""What the tests with real VMs share."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import paths
from common.linux import cgroup, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A sandbox's directory in a run directory of the test's own; no process of it may be left."""
    directory = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, directory)
    sandbox_id = f"v{uuid.uuid4().hex[:8]}"
    Path(paths.share_dir(sandbox_id)).mkdir(parents=True)
    yield sandbox_id
    left = cgroup.processes(sandbox_id)
    cgroup.kill(sandbox_id)
    mounts.unmount_below(directory)
    shutil.rmtree(directory)
    assert left == []
