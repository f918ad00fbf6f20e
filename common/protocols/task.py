"""containerd's Task API and what travels with it: the messages that this shim reads or writes.

Sources: containerd v1.6.20 ``runtime/v2/task/shim.proto``, ``api/types/task/task.proto``, ``api/types/mount.proto`` and
``api/runtime/options/v1`` (field numbers); v2.3 has the same ones. ``delete`` of the shim imports this module: it must
stay as light as :mod:`common.protobuf`.
"""

from __future__ import annotations

from common.protobuf import Message, boolean, bytes_, int_, message, messages, repeated, string, string_map, uint

SERVICE = "containerd.task.v2.Task"
SERVICE_V3 = "containerd.task.v3.Task"
"""Both have the same verbs with the same messages."""

# task.Status
CREATED, RUNNING, STOPPED, PAUSED, PAUSING = 1, 2, 3, 4, 5


class Empty(Message):
    """``google.protobuf.Empty``."""


class Any(Message):
    """``google.protobuf.Any``; containerd's type URLs are bare names without ``type.googleapis.com/``."""

    type_url: str = string(1)
    value: bytes = bytes_(2)


class Timestamp(Message):
    """``google.protobuf.Timestamp``: since 1970, UTC."""

    seconds: int = int_(1)
    nanos: int = int_(2)

    @classmethod
    def from_ns(cls, ns: int) -> Timestamp:
        """Return the time that is ``ns`` nanoseconds after 1970."""
        return cls(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)


class Mount(Message):
    """A mount that the shim is to make; ``target`` is relative to the root file system."""

    type: str = string(1)
    source: str = string(2)
    target: str = string(3)
    options: list[str] = repeated(string(4))


class StateRequest(Message):
    """Names a task, or with ``exec_id`` one of its execs. Start, Delete and Wait ask with the same fields."""

    id: str = string(1)
    exec_id: str = string(2)


class StateResponse(Message):
    """What is true of a process; ``id`` is the exec's id for an exec."""

    id: str = string(1)
    bundle: str = string(2)
    pid: int = uint(3)
    status: int = int_(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    terminal: bool = boolean(8)
    exit_status: int = uint(9)
    exited_at: Timestamp | None = message(10, Timestamp)
    exec_id: str = string(11)


class CreateTaskRequest(Message):
    """Create a task. Standard streams are paths of FIFOs, or empty."""

    id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = messages(3, Mount)
    terminal: bool = boolean(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    checkpoint: str = string(8)
    parent_checkpoint: str = string(9)
    options: Any | None = message(10, Any)


class PidResponse(Message):
    """The reply of Create and of Start."""

    pid: int = uint(1)


class DeleteResponse(Message):
    """The reply of Delete, and what the ``delete`` action prints."""

    pid: int = uint(1)
    exit_status: int = uint(2)
    exited_at: Timestamp | None = message(3, Timestamp)


class IdRequest(Message):
    """Names a task: Pids, Connect, Pause, Resume, Stats."""

    id: str = string(1)


class ProcessInfo(Message):
    """A process of a task."""

    pid: int = uint(1)


class PidsResponse(Message):
    """The processes of a task, as the host sees them."""

    processes: list[ProcessInfo] = messages(1, ProcessInfo)


class KillRequest(Message):
    """Send a signal; ``all`` means every process of the container."""

    id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint(3)
    all: bool = boolean(4)


class ExecProcessRequest(Message):
    """Register a further process; ``spec`` is an OCI process as JSON."""

    id: str = string(1)
    exec_id: str = string(2)
    terminal: bool = boolean(3)
    stdin: str = string(4)
    stdout: str = string(5)
    stderr: str = string(6)
    spec: Any | None = message(7, Any)


class ResizePtyRequest(Message):
    """The size of a process's terminal, in characters."""

    id: str = string(1)
    exec_id: str = string(2)
    width: int = uint(3)
    height: int = uint(4)


class CloseIORequest(Message):
    """Close standard input: what is in the FIFO still arrives, then the end."""

    id: str = string(1)
    exec_id: str = string(2)
    stdin: bool = boolean(3)


class CheckpointTaskRequest(Message):
    """Write a task's state to ``path``."""

    id: str = string(1)
    path: str = string(2)


class UpdateTaskRequest(Message):
    """Change a task's limits; ``resources`` are OCI's ``LinuxResources`` as JSON."""

    id: str = string(1)
    resources: Any | None = message(2, Any)
    annotations: dict[str, str] = string_map(3)


class StatsResponse(Message):
    """What a task has used, in one of containerd's forms (:mod:`common.protocols.metrics`)."""

    stats: Any | None = message(1, Any)


class WaitResponse(Message):
    """How a process ended."""

    exit_status: int = uint(1)
    exited_at: Timestamp | None = message(2, Timestamp)


class ConnectResponse(Message):
    """Who serves, and for which process."""

    shim_pid: int = uint(1)
    task_pid: int = uint(2)
    version: str = string(3)


class ShutdownRequest(Message):
    """Ask the shim to end, if it has no tasks."""

    id: str = string(1)
    now: bool = boolean(2)


class RuntimeOptions(Message):
    """``runtimeoptions.v1.Options``: the runtime's part of containerd's or ctr's configuration."""

    TYPE_URL = "runtimeoptions.v1.Options"

    type_url: str = string(1)
    config_path: str = string(2)
