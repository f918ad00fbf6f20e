"""What the tests with real VMs share."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import paths
from common.linux import cgroup, mounts
from common.testing.guest_sandbox import GuestSandbox
from guest.image import Image, build

if TYPE_CHECKING:
    from collections.abc import Iterator


_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def image() -> Image:
    """The guest's image, built if its sources have changed."""
    return build(Path(os.environ.get("PYKATA_GUEST_DIR") or _REPOSITORY / "build" / "guest"), print)


@pytest.fixture(scope="module")
def guest(image: Image) -> Iterator[GuestSandbox]:
    """A guest that is ready for containers, shared by a module's tests."""
    with GuestSandbox(image.vmlinux, image.initrd) as running:
        yield running


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
