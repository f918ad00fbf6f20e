"""Mounts, processes and cgroups of this kernel: what the shim's `delete` rests on."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.linux import cgroup, identity, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    yield path
    mounts.unmount_below(str(path))
    shutil.rmtree(path)


def made(path: Path) -> str:
    path.mkdir()
    return str(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (0, "")),
        (["rbind", "ro"], (mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY, "")),
        (["ro", "rw"], (0, "")),
        (["nosuid", "size=1m", "suid", "mode=700"], (0, "size=1m,mode=700")),
        (["lowerdir=a:b", "upperdir=c", "noexec"], (mounts.MS_NOEXEC, "lowerdir=a:b,upperdir=c")),
    ],
)
def test_options_are_flags_or_the_file_systems_own(options: list[str], expected: tuple[int, str]) -> None:
    assert mounts.parse_options(options) == expected


def test_a_readonly_bind_is_readonly_where_it_propagates(root: Path) -> None:
    inside, seen, source = made(root / "inside"), made(root / "seen"), made(root / "source")
    mounts.mount(inside, inside, flags=mounts.MS_BIND)
    mounts.set_propagation(inside, mounts.MS_PRIVATE)
    mounts.set_propagation(inside, mounts.MS_SHARED)
    mounts.mount(inside, seen, flags=mounts.MS_BIND)
    mounts.set_propagation(seen, mounts.MS_SLAVE)
    mounts.mount(source, made(root / "inside" / "ro"), flags=mounts.MS_BIND | mounts.MS_RDONLY)
    for place in (root / "inside" / "ro", root / "seen" / "ro"):
        with pytest.raises(OSError, match="Read-only") as refused:
            (place / "file").touch()
        assert refused.value.errno == errno.EROFS
    (root / "source" / "file").touch()
    assert (root / "seen" / "ro" / "file").exists()


def test_a_recursive_bind_is_readonly_all_the_way_down(root: Path) -> None:
    source = made(root / "source")
    mounts.mount("inner", made(root / "source" / "inner"), "tmpfs")
    mounts.mount(source, made(root / "target"), flags=mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY)
    with pytest.raises(OSError, match="Read-only"):
        (root / "target" / "inner" / "file").touch()
    (root / "source" / "inner" / "file").touch()


def test_everything_below_a_directory_is_unmounted(root: Path) -> None:
    outer = made(root / "with space\\and backslash")
    mounts.mount("outer", outer, "tmpfs")
    mounts.mount("again", outer, "tmpfs")
    mounts.mount("inner", made(Path(outer, "inner")), "tmpfs")
    other = made(root / "with")
    assert mounts.mounted_below(str(root)) == [f"{outer}/inner", outer, outer]
    assert mounts.mounted_below(other) == []
    mounts.unmount_below(str(root))
    assert mounts.mounted_below(str(root)) == []


def test_a_mount_in_use_is_detached(root: Path) -> None:
    target = made(root / "target")
    mounts.mount("busy", target, "tmpfs")
    with (root / "target" / "file").open("w"):
        mounts.unmount(target)
        assert mounts.mounted_below(str(root)) == []
    mounts.unmount(target)


def test_what_cannot_be_mounted_is_named(root: Path) -> None:
    with pytest.raises(OSError, match="No such device") as unknown:
        mounts.mount("x", str(root), "no-such-fs")
    assert unknown.value.filename == str(root)
    with pytest.raises(OSError, match="exceed the kernel's 4095"):
        mounts.mount("x", str(root), "tmpfs", data="x" * 4096)


def test_a_process_is_known_by_more_than_its_pid() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as sleeper:
        began = identity.start_time(sleeper.pid)
        assert identity.open_pidfd(sleeper.pid, began + 1) is None
        identity.kill(sleeper.pid, began + 1)
        assert sleeper.poll() is None, "another process under that pid is left alone"
        identity.kill(sleeper.pid, began)
        assert sleeper.wait() == -9
        identity.kill(sleeper.pid, began)


@pytest.fixture
def grouped() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A cgroup with a process in it."""
    name = f"t{secrets.token_hex(6)}"
    with subprocess.Popen(["/bin/sleep", "1000"]) as sleeper:
        Path(cgroup.create(name), "cgroup.procs").write_text(str(sleeper.pid))
        yield name, sleeper
        cgroup.kill(name)


def test_a_cgroup_is_killed_and_removed(grouped: tuple[str, subprocess.Popen[bytes]]) -> None:
    name, sleeper = grouped
    assert cgroup.processes(name) == [sleeper.pid]
    cgroup.kill(name)
    assert sleeper.wait() == -9
    assert not Path(cgroup.path(name)).exists()
    cgroup.kill(name)


def test_two_may_kill_a_cgroup_at_once(
    grouped: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one removes it while we wait: our open file then answers ENODEV."""
    name, sleeper = grouped
    read = os.pread

    def read_after_the_other(fd: int, size: int, offset: int) -> bytes:
        monkeypatch.setattr(os, "pread", read)
        sleeper.wait()
        Path(cgroup.path(name)).rmdir()
        return os.pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", read_after_the_other)
    cgroup.kill(name)
    assert not Path(cgroup.path(name)).exists()


def test_a_process_that_enters_after_the_kill_is_killed_as_well(
    grouped: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a VMM does that is being started while its sandbox is deleted."""
    name, sleeper = grouped
    rmdir = os.rmdir
    with subprocess.Popen(["/bin/sleep", "1000"]) as late:

        def remove_too_late(directory: str) -> None:
            monkeypatch.setattr(os, "rmdir", rmdir)
            Path(directory, "cgroup.procs").write_text(str(late.pid))
            rmdir(directory)

        monkeypatch.setattr(os, "rmdir", remove_too_late)
        cgroup.kill(name)
        assert (sleeper.wait(), late.wait()) == (-9, -9)
    assert not Path(cgroup.path(name)).exists()
