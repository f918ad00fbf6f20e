"""One process of a container: its state, its streams, those who wait for it.

::

    CREATED ──start──> STARTING ──runtime succeeded──> RUNNING ──exit──> EXITED
       │                   └──────runtime failed────────────────────────────^
       └──killed before it began────────────────────────────────────────────┘

Whoever waits is answered when the process has exited *and* the host has taken all of its output. Every output stream
gets its end, also that of a process that never ran.
"""

from __future__ import annotations

import posix

from common import status
from common.channel import BY_CALL, NO_STREAM
from guest.agent.calls import CallInput, CallOutput
from guest.agent.files import read_text
from guest.agent.oom import OomEvents
from guest.agent.rpc import RpcError
from guest.agent.signals import SIGKILL, SIGTERM
from guest.agent.streams import Input, Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.crun import Crun
    from guest.agent.reactor import Reactor
    from guest.agent.reaper import Reaper
    from guest.agent.rpc import Call
    from guest.agent.streams import StreamPorts
    from guest.agent.terminal import ConsoleSocket

CREATED, STARTING, RUNNING, EXITED = "created", "starting", "running", "exited"

_NEVER_RAN = 255
"""Exit status of a process that could not be started; the reason is in the answer to the start."""
_MAX_SIZE = 0xFFFF


class Streams:
    """Stream numbers of a process (``common.channel``). A terminal uses the first two only."""

    def __init__(self, stdin: int, stdout: int, stderr: int, *, is_terminal: bool) -> None:
        self.stdin = stdin
        self.outputs = (stdout,) if is_terminal else (stdout, stderr)
        self.is_terminal = is_terminal

    @property
    def ports(self) -> tuple[int, ...]:
        """Those that have a port."""
        return tuple(number for number in (self.stdin, *self.outputs) if number not in (BY_CALL, NO_STREAM))


class Guest:
    """What all processes of the guest share."""

    def __init__(self, reactor: Reactor, reaper: Reaper, crun: Crun, ports: StreamPorts) -> None:
        self.reactor = reactor
        self.reaper = reaper
        self.crun = crun
        self.ports = ports
        self.oom = OomEvents()
        self.hook_path = ""
        self.null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)


class Process:
    """A process that the runtime starts and the reaper buries."""

    def __init__(self, guest: Guest, streams: Streams, on_exit: Callable[[], None]) -> None:
        for stream in streams.ports:
            guest.ports.get(stream)
        self.state = CREATED
        self._guest = guest
        self._streams = streams
        self._on_exit = on_exit
        self._pid = 0
        self._status = 0
        self._size: tuple[int, int] | None = None
        self._terminal = -1
        self._input: Input | None = None
        self._outputs: list[Output] = []
        self._sources: dict[int, int] = {}
        self._called_input = CallInput(guest.reactor) if streams.stdin == BY_CALL else None
        self._called = [CallOutput(guest.reactor) if number == BY_CALL else None for number in streams.outputs]
        self._waiters: list[Callable[[int], None]] = []
        self._signals: list[int] = []

    def start(self, directory: str, arguments: list[str], on_started: Callable[[str], None]) -> None:
        """Have the runtime start it.

        Args:
            directory: for the files that are passed to and from the runtime.
            arguments: the runtime's verb and options; the last is the container's id.
            on_started: gets an empty text, or the runtime's error.

        Raises:
            RpcError: it has been started before, or was killed.
        """
        if self.state != CREATED:
            raise RpcError(status.FAILED_PRECONDITION, f"cannot start a process that is {self.state}")
        self.state = STARTING
        pid_file = f"{directory}/pid"
        console = self._console(f"{directory}/console")
        options = ["--detach", "--pid-file", pid_file, *(["--console-socket", console.path] if console else [])]
        ends = [self._guest.null] * 3 if console else self._open_pipes()

        def on_exit(error: str) -> None:
            if error:
                self._fail(console)
            else:
                self._run(int(read_text(pid_file)), console)
            on_started(error)
            if not error:
                self._guest.reaper.watch(self._pid, self._exit)

        verb, *others = arguments
        self._guest.crun.spawn(directory, [verb, *options, *others], ends, on_exit)
        for end in ends:
            if end != self._guest.null:
                posix.close(end)

    def signal(self, number: int) -> None:
        """Send it a signal; one that is about to start gets it then.

        Raises:
            RpcError: it has ended, or has not begun and the signal is not one that ends it.
        """
        if self.state == EXITED:
            raise RpcError(status.NOT_FOUND, "process already finished")
        if self.state == STARTING:
            self._signals.append(number)
        elif self.state == RUNNING:
            posix.kill(self._pid, number)
        elif number in (SIGKILL, SIGTERM):
            self._end_streams()
            self._exit(128 + number)
        else:
            raise RpcError(status.FAILED_PRECONDITION, f"cannot send signal {number} to a process that is {self.state}")

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, now or when it has one.

        Raises:
            RpcError: it has none.
        """
        if not self._streams.is_terminal:
            raise RpcError(status.FAILED_PRECONDITION, "process has no terminal")
        self._size = min(rows, _MAX_SIZE), min(columns, _MAX_SIZE)
        self._apply_size()

    def wait(self, on_settled: Callable[[int], None]) -> None:
        """Call back with the exit status when it has ended and its output has been taken."""
        self._waiters.append(on_settled)
        self._answer_waiters()

    def read(self, output: int, size: int, call: Call) -> None:
        """Answer with output: 0 is standard output or the terminal, 1 standard error.

        Raises:
            RpcError: it has none that is read by calls.
        """
        found = self._called[output] if output < len(self._called) else None
        if found is None:
            raise RpcError(status.FAILED_PRECONDITION, "this stream is not read by calls")
        found.read(size, call)

    @property
    def called_input(self) -> CallInput:
        """Its standard input, if that is written by calls.

        Raises:
            RpcError: it is not.
        """
        if self._called_input is None:
            raise RpcError(status.FAILED_PRECONDITION, "standard input is not written by calls")
        return self._called_input

    def close(self) -> None:
        """Give up what nobody can ask for any more: it is forgotten."""
        for output in filter(None, self._called):
            output.close()

    @property
    def is_settled(self) -> bool:
        """Whether it has ended and all of its output has been taken."""
        return self.state == EXITED and not self._outputs

    def _console(self, path: str) -> ConsoleSocket | None:
        if not self._streams.is_terminal:
            return None
        from guest.agent.terminal import ConsoleSocket

        return ConsoleSocket(path)

    def _open_pipes(self) -> list[int]:
        """Make pipes, and connect that of the input to its port; return the process's ends of them.

        Those of the outputs wait for the runtime's success: a runtime that fails says why on standard error too, and
        the caller gets that in the answer.
        """
        ends = [self._guest.null] * 3
        if self._streams.stdin != NO_STREAM:
            ends[0], sink = posix.pipe2(posix.O_CLOEXEC)
            self._connect_input(sink)
        for number, stream in enumerate(self._streams.outputs):
            if stream != NO_STREAM:
                self._sources[number], ends[number + 1] = posix.pipe2(posix.O_CLOEXEC)
        return ends

    def _connect_outputs(self) -> None:
        """Let the host have what the process writes."""
        while self._sources:
            number, source = self._sources.popitem()
            try:
                self._connect_output(number, source)
            except RpcError:  # the host has closed the stream's connection meanwhile
                posix.close(source)

    def _empty_outputs(self) -> None:
        """Have nothing in them but their ends."""
        for number, source in self._sources.items():
            posix.close(source)
            self._sources[number], end = posix.pipe2(posix.O_CLOEXEC)
            posix.close(end)

    def _run(self, pid: int, console: ConsoleSocket | None) -> None:
        self._pid = pid
        self.state = RUNNING
        self._connect_outputs()
        if console:
            self._terminal = console.receive()
            console.close()
            self._connect_terminal()
        for number in self._signals:
            posix.kill(pid, number)

    def _connect_terminal(self) -> None:
        self._apply_size()
        if self._streams.stdin != NO_STREAM:
            self._connect_input(posix.dup(self._terminal))
        if self._streams.outputs[0] != NO_STREAM:
            self._connect_output(0, posix.dup(self._terminal))

    def _apply_size(self) -> None:
        if self._size and self._terminal >= 0:
            from guest.agent.terminal import resize

            resize(self._terminal, *self._size)

    def _connect_input(self, sink: int) -> None:
        if self._called_input:
            self._called_input.attach(sink)
            return
        stream = self._streams.stdin
        self._input = Input(self._guest.reactor, self._guest.ports.get(stream), stream, sink)

    def _connect_output(self, number: int, source: int) -> None:
        if called := self._called[number]:
            called.attach(source)
            return
        stream = self._streams.outputs[number]

        def on_end() -> None:
            self._outputs.remove(output)
            self._answer_waiters()

        output = Output(self._guest.reactor, self._guest.ports.get(stream), stream, source, on_end)
        self._outputs.append(output)

    def _end_streams(self) -> None:
        """Give the streams of a process that never ran their ends."""
        for end in self._open_pipes():
            if end != self._guest.null:
                posix.close(end)
        self._connect_outputs()

    def _fail(self, console: ConsoleSocket | None) -> None:
        if console:
            console.close()
            self._end_streams()
        else:
            self._empty_outputs()
            self._connect_outputs()
        self._exit(_NEVER_RAN)

    def _exit(self, exit_status: int) -> None:
        self.state = EXITED
        self._status = exit_status
        if self._input:
            self._input.close()
        if self._called_input:
            self._called_input.close()
        for output in list(self._outputs):
            output.drain()
        for called in filter(None, self._called):
            called.drain()
        if self._terminal >= 0:
            posix.close(self._terminal)
            self._terminal = -1
        self._on_exit()
        self._answer_waiters()

    def _answer_waiters(self) -> None:
        if self.is_settled:
            waiters, self._waiters = self._waiters, []
            for on_settled in waiters:
                on_settled(self._status)
