"""The wheel: exactly our packages, and commands that start from it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("procs", "common", "guest", "pyproject.toml", "README.md")
COMMANDS = (
    "containerd-shim-kata-v2",
    "kata-vmm-manager",
    "kata-device-manager",
    "kata-monitor",
    "kata-runtime",
    "kata-shim-host",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            "/usr/bin/cp",
            "-r",
            *(str(ROOT / n) for n in ("procs", "common", "guest", "pyproject.toml", "README.md")),
            work,
        ],
        check=True,
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), str(work)],
        check=True,
    )
    (built,) = work.glob("pykata-*.whl")
    return built


def test_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"procs", "common", "guest"}


def test_holds_every_module(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    ours = {str(f.relative_to(ROOT)) for top in ("procs", "common", "guest") for f in (ROOT / top).rglob("*.py")}
    assert packed == ours


def test_nobody_else_owns_our_names() -> None:
    owners = packages_distributions()
    assert {owner for name in ("procs", "common", "guest") for owner in owners[name]} == {"pykata"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_start_whatever_the_directory_holds(command: str, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("raise SystemExit('the wrong package')\n")
    flag = "-v" if command.startswith("containerd") else "--help"
    done = subprocess.run(
        [Path(sys.executable).parent / command, flag], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout


@pytest.mark.parametrize("hypervisor", ["qemu", "clh", "fc"])
def test_the_shim_goes_by_any_name(hypervisor: str, tmp_path: Path) -> None:
    """containerd makes the program's name of the runtime's: ``io.containerd.kata-clh.v2``."""
    name = tmp_path / f"containerd-shim-kata-{hypervisor}-v2"
    name.symlink_to(Path(sys.executable).parent / "containerd-shim-kata-v2")
    done = subprocess.run([name, "-v"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pykata containerd shim")
