"""Every call of the Task API in every situation: our shim answers as runc's does, or better and documented so.

Both shims go through the same scripts. A script is a situation and the calls that are made in it, one after the other;
what it notes of each is a word: the state or status that was answered, or the error. Where ours differs from runc's on
purpose, :data:`BETTER` has ours and the reason. Real containers on this host play runc's part, and the fake guest ours.
"""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from common.errors import KataError
from common.protocols import metrics, task
from common.testing.isolation import run_dir
from common.testing.runc_stand import RuncStand
from common.testing.shim_client import Shim, started
from common.testing.shim_stand import ShimStand

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.protobuf import Message

_TIMEOUT_S = 60
_RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
_PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_SIGCONT, _SIGKILL = 18, 9
_NOBODY = "nobody"
_SAME = {
    "container not created": "container ID",
    "checkpoint of ID: the container of a VM cannot be checkpointed": "a VM cannot be checkpointed",
}
"""Texts that differ and mean the same: ours name the container."""
_STATUS = {1: "created", 2: "running", 3: "stopped", 4: "paused", 5: "pausing"}


async def nothing(shim: Shim) -> None:
    """There is a shim."""


async def created(shim: Shim) -> None:
    await shim.create("sleep", "1000")


async def running(shim: Shim) -> None:
    await created(shim)
    await shim.start()


async def paused(shim: Shim) -> None:
    await running(shim)
    await shim.ask("Pause")


async def stopped(shim: Shim) -> None:
    await running(shim)
    await shim.kill(_SIGKILL)
    await shim.wait()


async def lost(shim: Shim) -> None:
    await running(shim)
    await shim.stand.end_from_outside()
    await shim.wait()


async def deleted(shim: Shim) -> None:
    await stopped(shim)
    await shim.delete()


async def exec_created(shim: Shim) -> None:
    await running(shim)
    await execute(shim)


async def exec_running(shim: Shim) -> None:
    await exec_created(shim)
    await shim.start("e1")


async def exec_stopped(shim: Shim) -> None:
    await exec_running(shim)
    await shim.kill(_SIGKILL, "e1")
    await shim.wait("e1")


async def exec_outlived(shim: Shim) -> None:
    await exec_created(shim)
    await shim.kill(_SIGKILL)
    await shim.wait()


async def execute(shim: Shim) -> None:
    """Register the exec e1."""
    spec = {"args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    value = task.Any(type_url=_PROCESS, value=json.dumps(spec).encode())
    request = task.ExecProcessRequest(id=shim.stand.id, exec_id="e1", spec=value)
    await shim.stand.call(shim.client, "Exec", request, task.Empty)


@dataclass(frozen=True, kw_only=True)
class Script:
    """Calls in a situation.

    Attributes:
        prepare: brings the situation about.
        calls: verbs; one with a dot waits for its answer, `Wait` otherwise only if there is one already.
        during: a call that is under way while the others are made, and ends after they have been; nothing else is said
            of their order, so they must not depend on each other.
        container: which container is meant; empty is the one that there is.
        exec_id: which exec is meant.
    """

    prepare: Callable[[Shim], Awaitable[None]]
    calls: str
    during: str = ""
    container: str = ""
    exec_id: str = ""


_ALL = "State Pids Connect Stats Update ResizePty CloseIO Exec Kill Checkpoint Pause Resume Start Delete"
_HARMLESS = "State Pids Connect Stats Update ResizePty CloseIO Create Shutdown"
SCRIPTS = {
    "before the creation": Script(prepare=nothing, calls=f"{_ALL} Wait. Shutdown"),
    "created": Script(
        prepare=created,
        calls="State Pids Connect Stats Update ResizePty CloseIO Wait Exec Exec Pause Resume Checkpoint Shutdown State"
        " Create",
    ),
    "during the creation": Script(
        prepare=nothing, during="Create", calls=f"{_HARMLESS} Exec Kill Pause Resume Checkpoint"
    ),
    "killed during the creation": Script(prepare=nothing, during="Create", calls="Kill9"),
    "deleted during the creation": Script(prepare=nothing, during="Create", calls="Delete"),
    "started during the creation": Script(prepare=nothing, during="Create", calls="Start"),
    "during the start": Script(prepare=created, during="Start", calls=f"{_HARMLESS} Exec Kill Resume Start Delete"),
    "killed during the start": Script(prepare=created, during="Start", calls="Kill9"),
    "paused during the start": Script(prepare=created, during="Start", calls="Pause"),
    "created, then killed": Script(prepare=created, calls="Kill9 Wait. State Delete State"),
    "created, then deleted": Script(prepare=created, calls="Delete State"),
    "running": Script(
        prepare=running,
        calls="State Pids Connect Stats Update ResizePty CloseIO CloseIO Wait Kill Kill Exec Exec Start Delete Resume"
        " Shutdown Create State",
    ),
    "paused": Script(
        prepare=paused, calls="State Pids Stats Update Kill Wait Exec Pause Start Delete Resume State Pause State"
    ),
    "paused, then killed": Script(prepare=paused, calls="Kill9 Wait. State Delete"),
    "stopped": Script(
        prepare=stopped,
        calls="State Pids Connect Stats Update ResizePty CloseIO Wait. Wait. Kill Kill9 Exec Checkpoint Pause Resume"
        " Start Create Shutdown State Delete Delete State",
    ),
    "ended from outside": Script(
        prepare=lost,
        calls="State Pids Connect Update ResizePty CloseIO Wait. Kill Exec Pause Resume Start Delete State",
    ),
    "deleted": Script(prepare=deleted, calls=f"{_ALL} Wait."),
    "unknown container": Script(prepare=running, calls=f"{_ALL} Wait.", container=_NOBODY),
    "unknown exec": Script(prepare=running, calls="State Kill Start Delete Wait. ResizePty CloseIO", exec_id="zz"),
    "exec created": Script(
        prepare=exec_created, calls="State Kill Wait ResizePty CloseIO Exec Delete State", exec_id="e1"
    ),
    "exec running": Script(
        prepare=exec_running, calls="State Wait ResizePty CloseIO Exec Start Delete Kill State", exec_id="e1"
    ),
    "exec stopped": Script(
        prepare=exec_stopped, calls="State Wait. Kill ResizePty CloseIO Start Exec Delete Delete State", exec_id="e1"
    ),
    "exec of a stopped container": Script(prepare=exec_outlived, calls="State Kill Start Delete", exec_id="e1"),
}

_CLASS = "the class of the error tells a client what is wrong; runc's shim says `unknown`"
_VM = "there is nothing that CRIU could restore; the class says that it never will"
_GONE = "it never began, and its VM ended"
BETTER = {
    ("Create", "2: OCI runtime create failed: runc create failed: container with given ID already exists"): (
        "6: id ID", _CLASS
    ),
    ("Exec", "2: cannot exec in a paused state"): ("9: cannot exec in a paused state", _CLASS),
    ("Exec", "2: cannot exec in a stopped state"): ("9: cannot exec in a stopped state", _CLASS),
    ("Start", "2: cannot start a stopped process"): ("9: cannot start a stopped process", _CLASS),
    ("Start", "2: OCI runtime exec failed: exec failed: cannot exec in a stopped container"): (
        "9: cannot start exec e1: container ID is stopped", _CLASS
    ),
    ("CloseIO", "2: process does not exist zz"): ("5: process does not exist zz", _CLASS),
    ("Checkpoint", "2: cannot checkpoint a task in created state"): ("12: a VM cannot be checkpointed", _VM),
    ("Checkpoint", "2: cannot checkpoint a stopped container"): ("12: a VM cannot be checkpointed", _VM),
    ("Pids", "none"): ("some", "a containerd that restarts takes a shim without any for leaked, and kills it"),
    ("ResizePty", "2: cannot resize a stopped container"): ("ok", "as for a process that has no terminal"),
    ("State", "running 0 not ended"): (
        "created 0 not ended", "at once, during a start: containerd waits 2 s for a state, and a guest may take longer"
    ),
    ("Delete", "0"): ("137", _GONE),
    ("Kill", "9: process not created"): ("5: process already finished", _GONE),
}  # fmt: skip
"""By call and runc's answer: what ours answers instead, and why."""


def requests(shim: Shim, script: Script) -> dict[str, tuple[Message, type[Message]]]:
    """Return each verb's request and the type of its reply."""
    container, exec_id = script.container or shim.stand.id, script.exec_id
    named, both = task.IdRequest(id=container), task.StateRequest(id=container, exec_id=exec_id)
    resources = task.Any(type_url=_RESOURCES, value=json.dumps({"cpu": {"shares": 512}}).encode())
    spec = task.Any(type_url=_PROCESS, value=json.dumps({"args": ["true"], "cwd": "/"}).encode())
    return {
        "Create": (task.CreateTaskRequest(id=container, bundle=str(shim.stand.bundle)), task.PidResponse),
        "State": (both, task.StateResponse),
        "Start": (both, task.PidResponse),
        "Delete": (both, task.DeleteResponse),
        "Wait": (both, task.WaitResponse),
        "Pids": (named, task.PidsResponse),
        "Connect": (named, task.ConnectResponse),
        "Stats": (named, task.StatsResponse),
        "Pause": (named, task.Empty),
        "Resume": (named, task.Empty),
        "Checkpoint": (task.CheckpointTaskRequest(id=container, path="/nowhere"), task.Empty),
        "Kill": (task.KillRequest(id=container, exec_id=exec_id, signal=_SIGCONT), task.Empty),
        "Kill9": (task.KillRequest(id=container, exec_id=exec_id, signal=_SIGKILL), task.Empty),
        "Exec": (task.ExecProcessRequest(id=container, exec_id=exec_id or "e2", spec=spec), task.Empty),
        "ResizePty": (task.ResizePtyRequest(id=container, exec_id=exec_id, width=80, height=24), task.Empty),
        "CloseIO": (task.CloseIORequest(id=container, exec_id=exec_id, stdin=True), task.Empty),
        "Update": (task.UpdateTaskRequest(id=container, resources=resources), task.Empty),
        "Shutdown": (task.ShutdownRequest(id=container), task.Empty),
    }


async def play(shim: Shim, script: Script) -> list[tuple[str, str]]:
    """Make the calls of a script; return each with its answer, in a word."""
    await script.prepare(shim)
    if script.during:
        return await play_during(shim, script)
    known = requests(shim, script)
    answers = []
    for call in script.calls.split():
        request, reply = known[call.rstrip(".")]
        asked = shim.stand.spawn(answer(shim, call.rstrip("."), request, reply))
        if call == "Wait":
            await shim.stand.call(shim.client, "Connect", task.IdRequest(id=shim.stand.id), task.ConnectResponse)
            answers.append((call, "answers" if asked.done() else "waits"))
            asked.cancel()
        else:
            answers.append((call, await asked))
    return answers


async def play_during(shim: Shim, script: Script) -> list[tuple[str, str]]:
    """Make the calls of a script while another is under way; return each with its answer, in a word."""
    known, calls = requests(shim, script), script.calls.split()
    go_on = await shim.stand.hold(script.during)
    begun = shim.stand.spawn(created(shim) if script.during == "Create" else shim.start())
    await shim.reached()
    asked = [shim.stand.spawn(answer(shim, call, *known[call])) for call in calls]
    await shim.reached()
    await asyncio.to_thread(go_on)
    await begun
    return list(zip(calls, await asyncio.gather(*asked), strict=True))


async def answer(shim: Shim, call: str, request: Message, reply: type[Message]) -> str:
    """Make one call; return its answer, in a word."""
    try:
        told = await shim.stand.call(shim.client, call.rstrip("9"), request, reply)
    except KataError as err:
        return f"{err.code}: {_text(err.message.replace(shim.stand.id, 'ID').replace(_NOBODY, 'ID'))}"
    return _word(told)


def _text(message: str) -> str:
    """Return an error's text as a client sees it: containerd cuts the words of a class off and adds them again."""
    for words in (": not found", ": already exists", ": failed precondition", ": not implemented", ": unavailable"):
        message = message.removesuffix(words)
    return _SAME.get(message, message)


@functools.singledispatch
def _word(told: Message) -> str:
    return "ok"


@_word.register
def _(told: task.StateResponse) -> str:
    has_ended = told.exited_at is not None and told.exited_at.seconds > 0  # Go's zero time is long before 1970
    return f"{_STATUS[told.status]} {told.exit_status} {'ended' if has_ended else 'not ended'}"


@_word.register
def _(told: task.WaitResponse) -> str:
    return str(told.exit_status)


@_word.register
def _(told: task.DeleteResponse) -> str:
    return str(told.exit_status)


@_word.register
def _(told: task.PidsResponse) -> str:
    return "some" if told.processes else "none"


@_word.register
def _(told: task.ConnectResponse) -> str:
    return "a task" if told.task_pid else "no task"


@_word.register
def _(told: task.StatsResponse) -> str:
    return "metrics" if told.stats and told.stats.type_url in (metrics.V1_URL, metrics.V2_URL) else "none"


async def perform(kind: type[ShimStand], script: Script) -> list[tuple[str, str]]:
    """Play a script in a stand of its own."""
    with run_dir() as root:
        async with kind(root) as stand:
            return await play(await started(stand), script)


def play_on(kind: type[ShimStand], script: Script) -> list[tuple[str, str]]:
    return asyncio.run(asyncio.wait_for(perform(kind, script), _TIMEOUT_S))


@pytest.mark.parametrize("situation", SCRIPTS)
def test_each_call_is_answered_as_by_runcs_shim_or_better(situation: str) -> None:
    script = SCRIPTS[situation]
    ours, theirs = play_on(ShimStand, script), play_on(RuncStand, script)
    differing = [(answer, word) for answer, word in zip(ours, theirs, strict=True) if answer != word]
    assert [answer for answer, _ in differing] == [(call, BETTER[call, word][0]) for _, (call, word) in differing]


def test_every_call_is_in_the_table() -> None:
    verbs = {"Create", "Delete", "Wait", "Shutdown", *_ALL.split()}
    asked = {call.rstrip(".9") for script in SCRIPTS.values() for call in script.calls.split()}
    assert asked == verbs
