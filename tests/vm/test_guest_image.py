"""The image: built once, always the same, and a VM that ends when its agent does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from common.testing.guest_vm import GuestVm
from guest.image import Image, build

REPOSITORY = Path(__file__).parents[2]
OUTPUT = Path(os.environ.get("PYKATA_GUEST_DIR") or REPOSITORY / "build" / "guest")


@pytest.fixture(scope="module")
def image() -> Image:
    return build(OUTPUT, print)


def test_an_image_that_is_up_to_date_is_not_written_again(image: Image) -> None:
    before = [path.stat().st_mtime_ns for path in image]
    said: list[str] = []
    assert build(OUTPUT, said.append) == image
    assert [path.stat().st_mtime_ns for path in image] == before
    assert "extracting the kernel" not in said


def test_the_same_sources_give_the_same_bytes(image: Image, tmp_path: Path) -> None:
    shutil.copytree(OUTPUT / "cache", tmp_path / "cache", copy_function=os.link, symlinks=True)
    again = build(tmp_path, print)
    assert again != image
    for first, second in zip(image, again, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_the_manifest_says_what_the_image_was_made_of(image: Image) -> None:
    manifest = json.loads(image.manifest.read_text())
    assert {"crun", "libc6", "python3.11-minimal"} < manifest["packages"].keys()
    for key, path in (("vmlinux_sha256", image.vmlinux), ("initrd_sha256", image.initrd)):
        assert manifest[key] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_vm_ends_with_its_agent(image: Image) -> None:
    """No agent at all is an agent that ended early: the kernel panics, says so on the console, and QEMU exits."""
    with GuestVm(image.vmlinux, image.initrd, parameters="rdinit=/init.absent") as vm:
        assert vm.wait() == 0
        assert "Kernel panic" in vm.console()
