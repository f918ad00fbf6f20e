"""containerd's task events and the service that takes them.

Sources: containerd v1.6.20 ``api/events/task.proto`` and ``api/services/ttrpc/events/v1/events.proto``. Each event
says on which topic it is published and under which type URL it travels.
"""

from __future__ import annotations

from common.protobuf import Message, boolean, message, messages, string, uint
from common.protocols.task import Any, Mount, Timestamp

SERVICE = "containerd.services.events.ttrpc.v1.Events"
FORWARD = "Forward"


class Envelope(Message):
    """An event on its way; containerd refuses one without a time, a namespace, a topic or an event."""

    timestamp: Timestamp | None = message(1, Timestamp)
    namespace: str = string(2)
    topic: str = string(3)
    event: Any | None = message(4, Any)


class ForwardRequest(Message):
    """Publish an event on behalf of the shim."""

    envelope: Envelope | None = message(1, Envelope)


class TaskIO(Message):
    """Where the standard streams of a task are."""

    stdin: str = string(1)
    stdout: str = string(2)
    stderr: str = string(3)
    terminal: bool = boolean(4)


class TaskEvent(Message):
    """Base of the events: ``TOPIC`` and ``TYPE_URL`` are containerd's names for them."""

    TOPIC = ""
    TYPE_URL = ""


class TaskCreate(TaskEvent):
    """A task exists; its process does not run yet."""

    TOPIC = "/tasks/create"
    TYPE_URL = "containerd.events.TaskCreate"

    container_id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = messages(3, Mount)
    io: TaskIO | None = message(4, TaskIO)
    checkpoint: str = string(5)
    pid: int = uint(6)


class TaskStart(TaskEvent):
    """The task's own process runs."""

    TOPIC = "/tasks/start"
    TYPE_URL = "containerd.events.TaskStart"

    container_id: str = string(1)
    pid: int = uint(2)


class TaskExit(TaskEvent):
    """A process ended: the task's own if ``id`` equals ``container_id``, else that exec."""

    TOPIC = "/tasks/exit"
    TYPE_URL = "containerd.events.TaskExit"

    container_id: str = string(1)
    id: str = string(2)
    pid: int = uint(3)
    exit_status: int = uint(4)
    exited_at: Timestamp | None = message(5, Timestamp)


class TaskDelete(TaskEvent):
    """The task is forgotten. There is no such event for an exec."""

    TOPIC = "/tasks/delete"
    TYPE_URL = "containerd.events.TaskDelete"

    container_id: str = string(1)
    pid: int = uint(2)
    exit_status: int = uint(3)
    exited_at: Timestamp | None = message(4, Timestamp)
    id: str = string(5)


class TaskExecAdded(TaskEvent):
    """An exec is registered."""

    TOPIC = "/tasks/exec-added"
    TYPE_URL = "containerd.events.TaskExecAdded"

    container_id: str = string(1)
    exec_id: str = string(2)


class TaskExecStarted(TaskEvent):
    """An exec runs."""

    TOPIC = "/tasks/exec-started"
    TYPE_URL = "containerd.events.TaskExecStarted"

    container_id: str = string(1)
    exec_id: str = string(2)
    pid: int = uint(3)


class TaskOOM(TaskEvent):
    """The kernel killed a process of the task for want of memory."""

    TOPIC = "/tasks/oom"
    TYPE_URL = "containerd.events.TaskOOM"

    container_id: str = string(1)


class TaskPaused(TaskEvent):
    """All processes of the task stand still."""

    TOPIC = "/tasks/paused"
    TYPE_URL = "containerd.events.TaskPaused"

    container_id: str = string(1)


class TaskResumed(TaskEvent):
    """They go on."""

    TOPIC = "/tasks/resumed"
    TYPE_URL = "containerd.events.TaskResumed"

    container_id: str = string(1)
