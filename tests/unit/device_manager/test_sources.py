"""What can be behind a device, and what is said of what cannot."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import msgspec
import pytest

from common.errors import NotFoundError, UsageError
from common.services.vmm import BlockSpec, NetworkSpec, PmemSpec, ShareSpec, VhostUserDiskSpec, VsockSpec
from procs.device_manager import sources

if TYPE_CHECKING:
    from pathlib import Path

    from common.services.vmm import DeviceSpec


def examine(spec: DeviceSpec) -> str:
    return asyncio.run(sources.examine(spec))


def image(path: Path, size: int = 512) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_a_source_is_what_it_is_whatever_its_name(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk")
    (tmp_path / "link").symlink_to(disk)
    (tmp_path / "hard").hardlink_to(disk)
    names = {examine(BlockSpec(source=str(tmp_path / name))) for name in ("disk", "link", "hard")}
    assert len(names) == 1
    assert names != {examine(BlockSpec(source=str(image(tmp_path / "other"))))}


def test_a_share_is_a_directory(tmp_path: Path) -> None:
    assert examine(ShareSpec(source=str(tmp_path), tag="t")).startswith("directory ")
    with pytest.raises(UsageError, match="is a file; a share needs a directory"):
        examine(ShareSpec(source=str(image(tmp_path / "file")), tag="t"))


def test_what_is_no_disk_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for source, kind in (
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "socket", "a socket"),
        ("/dev/null", "a character device"),
    ):
        with pytest.raises(UsageError, match=f"is {kind}; a block device needs a disk or a disk image") as refused:
            examine(BlockSpec(source=str(source)))
        assert refused.value.hint


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "missing/below", "loop"):
        with pytest.raises(NotFoundError, match=f"source {tmp_path}/{name} cannot be used: ") as refused:
            examine(BlockSpec(source=str(tmp_path / name)))
        assert refused.value.hint


@pytest.mark.parametrize("source", ["", "disk", "../disk"])
def test_a_path_that_depends_on_a_directory_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="is not an absolute path"):
        examine(BlockSpec(source=source))


def test_an_empty_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a size of zero"):
        examine(BlockSpec(source=str(image(tmp_path / "empty", 0))))


def test_persistent_memory_is_a_file_of_whole_steps(tmp_path: Path) -> None:
    memory = image(tmp_path / "memory", 2 << 20)
    assert examine(PmemSpec(source=str(memory))) == examine(BlockSpec(source=str(memory))), "one file, one device"
    for wrong, said in ((tmp_path, "is a directory; persistent memory needs a file"), (memory, "has 512 bytes")):
        os.truncate(memory, 512)
        with pytest.raises(UsageError, match=said):
            examine(PmemSpec(source=str(wrong)))
    image(memory, 0)
    with pytest.raises(UsageError, match="has 0 bytes") as refused:
        examine(PmemSpec(source=str(memory)))
    assert refused.value.hint


def test_a_disk_that_a_program_serves_is_its_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    assert examine(VhostUserDiskSpec(source=str(tmp_path / "socket"))).startswith("socket ")
    with pytest.raises(UsageError, match="is a directory; a vhost-user disk needs the socket") as refused:
        examine(VhostUserDiskSpec(source=str(tmp_path)))
    assert refused.value.hint


@pytest.mark.parametrize("cid", [3, 0xFFFFFFFE])
def test_a_socket_device_is_its_address(cid: int) -> None:
    assert examine(VsockSpec(cid=cid)) == f"vsock address {cid}"


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_an_address_that_no_guest_can_have_is_refused(cid: int) -> None:
    with pytest.raises(UsageError, match=f"a guest cannot have the vsock address {cid}") as refused:
        examine(VsockSpec(cid=cid))
    assert refused.value.hint == "they have 3 to 4294967294"


def test_a_network_device_is_an_interface_of_a_namespace(tmp_path: Path) -> None:
    (tmp_path / "pod").symlink_to("/proc/self/ns/net")
    spec = NetworkSpec(namespace="/proc/self/ns/net", interface="tap0")
    assert examine(spec) == examine(NetworkSpec(namespace=f"/proc/{os.getpid()}/ns/net", interface="tap0"))
    assert examine(spec) == examine(NetworkSpec(namespace=str(tmp_path / "pod"), interface="tap0"))
    assert examine(spec) != examine(NetworkSpec(namespace="/proc/self/ns/net", interface="tap1"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (NetworkSpec(namespace="/proc/self/ns/mnt", interface="tap0"), "is a file; a network device needs a network"),
        (NetworkSpec(namespace="/etc/passwd", interface="tap0"), "is a file; a network device needs a network"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface=""), "'' cannot be the name of an interface"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface=".."), "cannot be the name of an interface"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface="tap%d"), "cannot be the name of an interface"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface="a/b"), "cannot be the name of an interface"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface="a" * 16), "cannot be the name of an interface"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface="t", mac="02"), "'02' cannot be the address of one"),
        (NetworkSpec(namespace="/proc/self/ns/net", interface="t", mac="01:00:00:00:00:00"), "the address of one"),
    ],
)
def test_what_is_no_interface_is_refused(spec: NetworkSpec, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        examine(spec)
    assert refused.value.hint


def test_a_mac_of_an_attach_is_one_devices_and_no_makers() -> None:
    spec = NetworkSpec(namespace="/proc/self/ns/net", interface="tap0")
    assert spec.address("18eafe47958bf9658188") == "02:8b:f9:65:81:88"
    assert msgspec.structs.replace(spec, mac="0a:00:00:00:00:01").address("18") == "0a:00:00:00:00:01"
