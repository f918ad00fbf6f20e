"""Tasks and execs: which there are, their states, and what may be asked in which state. Pure: no I/O, no clock.

::

                start            started              exited
    CREATED ──────────> STARTING ────────> RUNNING ────────────> STOPPED ──delete──> (gone)
       │                   │                │   ^                  ^
       │                   │        pausing │   │ resumed          │
       │                   │                v   │                  │
       │                   │           PAUSING RESUMING            │
       │                   │                │   ^                  │
       │                   │         paused v   │ resuming         │
       │                   │               PAUSED                  │
       └───────────────────┴── exited (from every state) ──────────┘

Only a container's own process is paused, and with it the whole container. STARTING and RESUMING are ours; containerd
sees CREATED and PAUSED. The errors are those of runc's shim, word for word where clients read them (containerd v1.6.20,
``runtime/v2/runc/container.go`` and ``pkg/process``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from common.errors import AlreadyExistsError, BugError, KataError, NotFoundError, StateError

UNKNOWN_STATUS = 255
"""Exit status of a process that could not be started, or whose end was not seen (upstream's choice too)."""


class State(enum.Enum):
    """Where a process is in its life."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPED = "stopped"


HALTED = frozenset((State.PAUSING, State.PAUSED, State.RESUMING))
"""States in which a container is paused, or may be."""


class Ask(enum.Enum):
    """What a client may ask of a process."""

    START = "start"
    KILL = "kill"
    DELETE = "delete"
    EXEC = "exec"
    PAUSE = "pause"
    RESUME = "resume"
    UPDATE = "update"


_REFUSALS: dict[tuple[Ask, State], KataError] = {
    (Ask.START, State.STARTING): KataError("cannot start a process that is starting"),
    (Ask.START, State.RUNNING): KataError("cannot start a running process"),
    (Ask.START, State.STOPPED): StateError("cannot start a stopped process"),
    (Ask.KILL, State.STARTING): StateError("process not created"),
    (Ask.KILL, State.STOPPED): NotFoundError("process already finished"),
    (Ask.DELETE, State.STARTING): KataError("cannot delete a running process"),
    (Ask.DELETE, State.RUNNING): KataError("cannot delete a running process"),
    (Ask.EXEC, State.STARTING): StateError("cannot exec in a created state"),
    (Ask.EXEC, State.STOPPED): StateError("cannot exec in a stopped state"),
    (Ask.PAUSE, State.CREATED): KataError("cannot pause task in created state"),
    (Ask.PAUSE, State.STARTING): KataError("cannot pause task in created state"),
    (Ask.PAUSE, State.STOPPED): KataError("cannot pause a stopped container"),
    (Ask.RESUME, State.CREATED): KataError("cannot resume task in created state"),
    (Ask.RESUME, State.STARTING): KataError("cannot resume task in created state"),
    (Ask.RESUME, State.RUNNING): KataError("cannot resume a running process"),
    (Ask.RESUME, State.PAUSING): KataError("cannot resume a process that is pausing"),
    (Ask.RESUME, State.RESUMING): KataError("cannot resume a process that is resuming"),
    (Ask.RESUME, State.STOPPED): KataError("cannot resume a stopped container"),
    (Ask.UPDATE, State.STARTING): KataError("cannot update a process that is starting"),
    (Ask.UPDATE, State.STOPPED): KataError("cannot update a stopped container"),
    **{
        (ask, state): refusal
        for state in HALTED
        for ask, refusal in {
            Ask.START: KataError("cannot start a paused process"),
            Ask.DELETE: KataError("cannot delete a paused process"),
            Ask.EXEC: StateError("cannot exec in a paused state"),
            Ask.PAUSE: KataError("cannot pause a paused container"),
        }.items()
    },
}

_MOVES: dict[State, frozenset[State]] = {
    State.CREATED: frozenset((State.STARTING, State.STOPPED)),
    State.STARTING: frozenset((State.RUNNING, State.STOPPED)),
    State.RUNNING: frozenset((State.PAUSING, State.STOPPED)),
    State.PAUSING: frozenset((State.PAUSED, State.RUNNING, State.STOPPED)),
    State.PAUSED: frozenset((State.RESUMING, State.STOPPED)),
    State.RESUMING: frozenset((State.RUNNING, State.PAUSED, State.STOPPED)),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stdio:
    """Where the standard streams of a process go: paths of FIFOs, or empty; for output also other kinds of names."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    is_terminal: bool = False


@dataclass(slots=True, kw_only=True)
class Process:
    """A process of a container: the task's own (``exec_id`` empty) or an exec.

    Attributes:
        container_id: whose.
        exec_id: which exec, or empty.
        stdio: its standard streams.
        state: where it is in its life.
        exit_status: how it ended: its exit code, or 128 and the signal's number.
        exited_at_ns: when, in nanoseconds since 1970; 0 while it has not.
    """

    container_id: str
    exec_id: str
    stdio: Stdio
    state: State = State.CREATED
    exit_status: int = 0
    exited_at_ns: int = 0

    def check(self, ask: Ask) -> None:
        """Refuse what the process's state does not allow.

        Raises:
            KataError: with the text and code that runc's shim would give.
        """
        refusal = _REFUSALS.get((ask, self.state))
        if refusal is None and ask is Ask.KILL and self.exec_id and self.state is State.CREATED:
            refusal = StateError("process not created")
        if refusal is not None:
            raise type(refusal)(refusal.message)

    def move(self, state: State) -> None:
        """Note that it is in another state, which must be one that can follow.

        Raises:
            BugError: it cannot.
        """
        if state not in _MOVES[self.state]:
            raise BugError(f"process {self.container_id}/{self.exec_id} cannot go from {self.state} to {state}")
        self.state = state

    def exited(self, status: int, now_ns: int) -> None:
        """Note that it ended, or will never begin."""
        self.move(State.STOPPED)
        self.exit_status = status
        self.exited_at_ns = now_ns


@dataclass(slots=True, kw_only=True)
class Task:
    """A container: its own process and its execs."""

    init: Process
    execs: dict[str, Process] = field(default_factory=dict)

    def add_exec(self, exec_id: str, stdio: Stdio) -> Process:
        """Register an exec.

        Raises:
            AlreadyExistsError: the id is taken.
            StateError: the container is not one that can take it.
        """
        if exec_id in self.execs or exec_id in ("", self.init.container_id):
            raise AlreadyExistsError(f"id {exec_id}")
        self.init.check(Ask.EXEC)
        process = Process(container_id=self.init.container_id, exec_id=exec_id, stdio=stdio)
        self.execs[exec_id] = process
        return process

    def process(self, exec_id: str) -> Process:
        """Return the task's own process, or the exec that is named.

        Raises:
            NotFoundError: there is no such exec.
        """
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFoundError(f"process does not exist {exec_id}") from None
