"""The emulated host: it has a KVM that works, our files, and tells how a command ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.testing.spare_disk import SERIAL

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def kvm_host(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/kvm_host.py", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


@pytest.mark.soak
def test_it_runs_a_command_and_says_how_it_ended(tmp_path: Path) -> None:
    script = f"test -c /dev/kvm -a -c /dev/vhost-vsock -a ! -e {tmp_path} && echo here is $PWD; exit 7"
    done = kvm_host("--timeout", "600", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout.strip()) == (7, f"here is {CHECKOUT}")


@pytest.mark.soak
def test_it_has_a_disk_to_spare_behind_an_iommu() -> None:
    script = (
        f"for disk in /sys/class/nvme/*; do grep -q {SERIAL} $disk/serial && ls $disk/device/iommu_group/devices; done"
    )
    done = kvm_host("--timeout", "600", "--spare-disk", "--", "sh", "-c", script)
    assert (done.returncode, len(done.stdout.split())) == (0, 1), "alone in its group"


def test_it_says_what_is_no_kernel() -> None:
    done = kvm_host("--kernel", "pyproject.toml", "--", "true")
    assert done.returncode == 1
    assert "pyproject.toml is no Debian package of a kernel" in done.stderr


@pytest.mark.soak
def test_it_says_when_the_time_has_passed() -> None:
    done = kvm_host("--timeout", "3", "--", "true")
    assert done.returncode == 124
    assert "no exit status" in done.stderr


@pytest.mark.soak
def test_it_leaves_nothing_that_runs_when_it_is_killed() -> None:
    command = [sys.executable, "deploy/kvm_host.py", "--", "sh", "-c", "echo up; exec sleep 1000"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        children = psutil.Process(host.pid).children(recursive=True)
        assert {"qemu-system-x86_64", "virtiofsd"} <= {child.name() for child in children}
        host.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
