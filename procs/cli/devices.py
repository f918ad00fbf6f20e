"""``kata-runtime devices``: what the device manager knows, and what happened to a device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from common.errors import NotFoundError
from common.services import device as contract
from common.services.vmm import BlockSpec
from procs.cli.columns import age, aligned, moment
from procs.cli.services import ask_all

if TYPE_CHECKING:
    import argparse

    from common.services.device import Device, Story

_HEADINGS = ("DEVICE", "SANDBOX", "STATE", "SINCE", "KIND", "PLACE", "IN GUEST", "HYPERVISOR ID", "HOLDERS", "SOURCE")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = commands.add_parser(
        "devices",
        help="list devices, or tell what happened to one",
        usage="%(prog)s [SANDBOX] [--json]\n       %(prog)s story DEVICE [--json]",
        description="List the devices of every sandbox, or of one; or tell what happened to a device that is or was.",
        epilog="A quarantined device was never let go by its guest: it keeps its place and source until its VM ends.",
    )
    parser.add_argument("what", nargs="*", help="a sandbox; or the word story and a device")
    parser.add_argument("--json", action="store_true", help="as the bus says it, one document")
    parser.set_defaults(run=run, error=parser.error)


async def run(arguments: argparse.Namespace) -> None:
    """Ask and print."""
    match arguments.what:
        case ["story", device_id]:
            await _tell_story(device_id, is_json=arguments.json)
        case ["story"]:
            arguments.error("story needs a DEVICE; `kata-runtime devices` lists them")
        case [] | [_]:
            await _list("".join(arguments.what), is_json=arguments.json)
        case _:
            arguments.error(f"too much: {' '.join(arguments.what)}")


async def _list(sandbox_id: str, *, is_json: bool) -> None:
    """Print the devices of every shard; those of a shard that is down are missed, and that is said at the end."""
    answers, failures = await ask_all(contract.LIST_DEVICES, contract.ListDevices(sandbox_id=sandbox_id))
    devices = sorted((device for answer in answers for device in answer.devices), key=lambda device: device.device_id)
    if answers:
        _print_list(contract.DeviceList(devices=tuple(devices)), is_json=is_json)
    if failures:
        raise failures[0]
    if sandbox_id and not devices and not is_json:
        raise NotFoundError(f"sandbox {sandbox_id} has no devices", hint="`kata-runtime devices` lists those of all")


def _print_list(listed: contract.DeviceList, *, is_json: bool) -> None:
    if is_json:
        _print_json(listed)
    elif listed.devices:
        print(aligned([_HEADINGS, *(_row(device, time.time()) for device in listed.devices)]))


async def _tell_story(device_id: str, *, is_json: bool) -> None:
    """Print what happened to a device, as the shard tells that knows it."""
    stories, failures = await ask_all(contract.TELL_STORY, contract.TellStory(device_id=device_id))
    if not stories:
        raise min(failures, key=lambda failure: isinstance(failure, NotFoundError))
    (story,) = stories
    if is_json:
        _print_json(story)
    else:
        print(f"device {story.device_id} of sandbox {story.sandbox_id}\n{aligned(_chapters(story))}")


def _print_json(message: msgspec.Struct) -> None:
    print(msgspec.json.format(msgspec.json.encode(message), indent=2).decode())


def _row(device: Device, now: float) -> tuple[str, ...]:
    return (
        device.device_id,
        device.sandbox_id,
        device.state,
        age(device.since, now),
        device.kind,
        f"{device.bus}/{device.slot}",
        device.guest_path,
        device.hypervisor_id,
        _holders(device),
        _source(device),
    )


def _holders(device: Device) -> str:
    """Return who holds a device; who has not confirmed yet has a question mark."""
    return ",".join(f"{holder.name or '(sandbox)'}{'' if holder.is_confirmed else '?'}" for holder in device.holders)


def _source(device: Device) -> str:
    if device.spec is None:
        return ""
    is_read_only = isinstance(device.spec, BlockSpec) and device.spec.is_read_only
    return f"{device.spec.source}{' (read-only)' if is_read_only else ''}"


def _chapters(story: Story) -> list[tuple[str, ...]]:
    began = story.chapters[0].at
    return [
        (moment(chapter.at), f"+{chapter.at - began:.3f}s", chapter.state, chapter.event, chapter.detail)
        for chapter in story.chapters
    ]
