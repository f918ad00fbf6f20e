"""What a reader may rely on in every file of this repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if (ROOT / name).is_file()
]
PYTHON = [file for file in TRACKED if file.suffix == ".py"]
DOCUMENTS = [file for file in TRACKED if file.suffix == ".md"]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_target_of_the_makefile_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    helped = set(re.findall(r"^([a-z0-9-]+):.*## \S", makefile, re.MULTILINE))
    assert set(phony[1].split()) == helped


def test_make_help_lists_the_two_commands() -> None:
    shown = subprocess.run(["/usr/bin/make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^\s+demo\s", shown, re.MULTILINE)
    assert re.search(r"^\s+test\s", shown, re.MULTILINE)


@pytest.mark.parametrize("file", PYTHON, ids=relative)
def test_no_file_has_grown_past_reading(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 600


@pytest.mark.parametrize("file", TRACKED, ids=relative)
def test_nothing_names_one_machine(file: Path) -> None:
    if file == Path(__file__):
        return
    text = file.read_text()
    for place in (f"{ROOT}/", "/home/", "/root/.", "site-packages/"):
        assert place not in text, f"{relative(file)} names {place}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=relative)
def test_documents_name_only_files_that_exist(file: Path) -> None:
    for name in re.findall(r"`((?:common|procs|guest|docs|deploy|bench|tests)/[\w./-]+)`", file.read_text()):
        path = ROOT / name.rstrip("/")
        assert path.exists() or path.with_suffix(".py").exists(), f"{relative(file)} names {name}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=relative)
def test_documents_name_only_targets_that_exist(file: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z0-9-]+)", file.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{relative(file)} names make {target}"
