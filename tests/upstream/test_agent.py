"""Our shim with upstream's Rust agent: what a container is expected to do, with streams by calls."""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.linux import loop
from common.testing.isolation import in_event_loop, run_dir
from common.testing.shim_client import KILLED, Reader, Shim, started
from common.testing.upstream_stand import UpstreamStand

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def begun(images: tuple[Path, Path]) -> AsyncIterator[tuple[UpstreamStand, Shim]]:
    with run_dir() as root:
        async with UpstreamStand(root, images) as stand:
            yield stand, await started(stand)


@in_event_loop
async def test_a_container_with_its_streams(images: tuple[Path, Path]) -> None:
    async with begun(images) as (stand, shim):
        out, err, stdin = Reader(stand, "out"), Reader(stand, "err"), stand.fifo("in")
        sink = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
        script = "uname -r; cat; echo wrong >&2; echo kept > /file; exit 3"
        await shim.create("sh", "-c", script, stdin=stdin, stdout=out.path, stderr=err.path)
        await shim.start()
        os.write(sink, b"right\n")
        await out.until(b"right\n")
        os.close(sink)
        await shim.close_io()
        said = await out.all()
        assert said.endswith(b"right\n")
        assert os.uname().release.encode() not in said, "it is another kernel"
        assert await err.all() == b"wrong\n"
        assert await shim.wait() == 3
        assert (stand.rootfs / "file").read_text() == "kept\n"
        await shim.delete()


@in_event_loop
async def test_execs_much_output_and_a_kill(images: tuple[Path, Path]) -> None:
    async with begun(images) as (stand, shim):
        await shim.create("sleep", "1000")
        await shim.start()
        out = Reader(stand, "out")
        await shim.exec("e1", "/bin/head", "-c", "1000000", "/dev/zero", stdout=out.path)
        await shim.start("e1")
        assert await out.all() == bytes(1_000_000)
        assert await shim.wait("e1") == 0
        await shim.exec("e2", "/bin/false")
        await shim.start("e2")
        assert await shim.wait("e2") == 1
        await shim.kill(9, is_all=True)
        assert await shim.wait() == KILLED
        await shim.delete()


@in_event_loop
async def test_a_block_device_as_a_node_and_as_a_mount(images: tuple[Path, Path]) -> None:
    async with begun(images) as (stand, shim):
        content = stand.root / "disk"
        content.write_bytes(b"right".ljust(1 << 20))
        with loop.device(str(content), is_read_only=False) as node:
            give(stand, node)
            out = Reader(stand, "out")
            script = "head -c 5 /dev/data; head -c 5 /mnt/data; printf new | dd of=/dev/data conv=notrunc"
            await shim.create("sh", "-c", script, stdout=out.path)
            await shim.start()
            assert await out.all() == b"rightright"
            assert await shim.wait() == 0
            await shim.delete()
        assert content.read_bytes().startswith(b"newht")


def give(stand: UpstreamStand, node: str) -> None:
    """Have the container of a stand's bundle given a block device in both ways."""
    number = Path(node).stat().st_rdev
    numbers = {"type": "b", "major": os.major(number), "minor": os.minor(number)}
    spec = stand.spec()
    spec["mounts"].append({"destination": "/mnt/data", "type": "bind", "source": node, "options": ["bind"]})
    spec["linux"]["devices"] = [{"path": "/dev/data", **numbers, "fileMode": 0o660, "uid": 0, "gid": 0}]
    allowed = {"allow": True, "access": "rwm", **numbers}
    spec["linux"]["resources"]["devices"] = [{"allow": False, "access": "rwm"}, allowed]
    (stand.bundle / "config.json").write_text(json.dumps(spec))
