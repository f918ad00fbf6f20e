"""``kata-runtime`` as a process: what an operator sees, with services and without."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from common import paths
from common.testing.device_stand import standing
from common.testing.hotplug_stand import disk
from common.testing.isolation import in_event_loop, run_dir
from common.testing.shard_stand import sharding
from procs.device_manager.states import Event


async def runtime(*arguments: str) -> tuple[int | None, str, str]:
    """Run ``kata-runtime``; return its exit code, output and complaints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "procs.cli", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    return process.returncode, output.decode(), complaint.decode()


@in_event_loop
async def test_devices_are_listed_and_their_stories_told() -> None:
    async with standing() as stand:
        assert await runtime("devices") == (0, "", "")
        attached = await stand.attach("a", holder="c1")
        await stand.attach("a", holder="c2")
        await stand.confirm(attached, "c1")
        code, table, _ = await runtime("devices")
        heading, row = table.splitlines()
        assert (code, heading.split()[:4]) == (0, ["DEVICE", "SANDBOX", "STATE", "SINCE"])
        assert row.split()[:3] == [attached.device_id, "s1", "attached"]
        assert row.split()[-6:] == ["share", "port0/0", "04/00", "share-1", "c1,c2?", f"{paths.run_dir()}/a"]
        assert attached.device_id in (await runtime("devices", "s1"))[1]
        assert json.loads((await runtime("devices", "s1", "--json"))[1])["devices"][0]["state"] == "attached"

        code, told, _ = await runtime("devices", "story", attached.device_id)
        assert (code, told.splitlines()[0]) == (0, f"device {attached.device_id} of sandbox s1")
        assert "added by the hypervisor" in told
        story = json.loads((await runtime("devices", "story", attached.device_id, "--json"))[1])
        # Its list may have been asked at any moment: that is how a device manager begins.
        asked = [c for c in story["chapters"] if c["event"] not in (Event.MISSED, Event.PRESENT)]
        assert [c["state"] for c in asked] == ["attaching", "plugged", "plugged", "attached"]
        assert [c["detail"] for c in asked[1:]] == ["share-1", "c2", "c1"]


@in_event_loop
async def test_devices_of_every_shard_are_listed_and_a_shard_that_is_down_is_missed_aloud() -> None:
    async with sharding(2) as stand:
        sandboxes = [await stand.sandbox(shard=number) for number in range(2)]
        ids = [(await devices.attach(spec=disk(name))).device_id for devices, name in zip(sandboxes, "ab", strict=True)]
        code, listed, _ = await runtime("devices", "--json")
        assert (code, [device["device_id"] for device in json.loads(listed)["devices"]]) == (0, ids)
        for device_id in ids:
            assert f"device {device_id} of" in (await runtime("devices", "story", device_id))[1]
        stand.shards[1].kill()
        code, listed, complaint = await runtime("devices")
        assert code == 1
        assert (ids[0] in listed, ids[1] in listed) == (True, False)
        assert "service device.1 is down" in complaint
        assert "service device.1 is down" in (await runtime("devices", "story", ids[1]))[2]


@in_event_loop
async def test_what_is_not_there_is_said_with_a_remedy() -> None:
    async with standing() as stand:
        code, output, complaint = await runtime("devices", "nobody")
        assert (code, output) == (1, "")
        assert complaint.startswith("kata-runtime: sandbox nobody has no devices (")
        code, _, complaint = await runtime("devices", "story", "d9")
        assert code == 1
        assert "nothing is known of a device 'd9' (`kata-runtime devices` lists" in complaint
        stand.kill()
        code, _, complaint = await runtime("devices")
        assert code == 1
        assert "service device is down (`supervisorctl status`" in complaint


@in_event_loop
async def test_a_host_without_services_says_where_it_looked() -> None:
    with run_dir() as directory:
        code, _, complaint = await runtime("devices")
        assert code == 1
        assert f"cannot reach pykata's services in {directory}/bus: No such file or directory (" in complaint
        (Path(directory) / "bus").touch()
        assert "Not a directory" in (await runtime("devices"))[2]


@in_event_loop
async def test_a_wrong_command_line_shows_the_right_one() -> None:
    with run_dir():  # without services, which have no part in it
        for arguments in (
            (),
            ("nothing",),
            ("devices", "story"),
            ("devices", "story", "a", "b"),
            ("devices", "a", "b"),
        ):
            code, output, complaint = await runtime(*arguments)
            assert (code, output) == (2, "")
            assert "usage: kata-runtime" in complaint
