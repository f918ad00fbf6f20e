"""``start``: take the sandbox's name, listen, fork the server, print the address.

The order is what makes it safe::

    check the id and the container's type     nothing has been made yet
    take the name (record)                    from here on a failure undoes what was made
    listen                                    containerd may connect as soon as it knows the address
    fork, setsid, fork                        the server asks for the VM while the rest happens
    write `address` and `shim.pid`, print     containerd reads until the end of file: the server must not hold fd 1 or 2

The server's process is a fork and not an execution, so that it need not start Python again. It never returns to the
caller: its exit status is its own. Who forks is the host (:mod:`procs.shim.host`), which has imported all that serves,
or else this process. They agree over one connection, and exactly one server comes of it, whoever dies when::

    start                                     the host's fork
    its code, the launch, the environment ->  compares, takes over what is the caller's
                                          <-  READY                    until here `start` may give up and fork by itself
    listener and lock, by SCM_RIGHTS      ->  serves: without them it cannot, and ends
                                          <-  its pid                  or the end of file, if it is dead
"""

from __future__ import annotations

import contextlib
import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET
from _socket import socket as _Socket  # noqa: N812 - `socket` itself costs 8 ms, and it adds nothing needed here

from common import paths
from procs.shim import bootstrap, cleanup, names, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READY = b"ready"
HOST_TIMEOUT_S = 2.0
"""How long one side of the agreement waits for the other: milliseconds do, unless one of them hangs."""

_FIELDS = 8
_TYPE_KEYS = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")


class Launch:
    """What ``start`` knows and the server needs.

    Attributes:
        sandbox_id: the container's id; a single container is its own sandbox.
        namespace: containerd's namespace.
        address: containerd's socket.
        bundle: the bundle's directory.
        is_debug: whether containerd logs at debug level.
        options: the runtime's options that came on standard input, or nothing.
        has_params: whether containerd gave more than that (:mod:`procs.shim.bootstrap`).
        socket_path: where the server listens.
    """

    __slots__ = ("address", "bundle", "has_params", "is_debug", "namespace", "options", "sandbox_id", "socket_path")

    def __init__(self, *, sandbox_id: str, namespace: str, address: str, bundle: str, is_debug: bool) -> None:
        self.sandbox_id = sandbox_id
        self.namespace = namespace
        self.address = address
        self.bundle = bundle
        self.is_debug = is_debug
        self.options = b""
        self.has_params = False
        self.socket_path = names.socket_path(address, namespace, sandbox_id)

    def encode(self) -> bytes:
        """Return what :meth:`decode` takes, without ``has_params``, which only the answer depends on.

        It is text joined by NUL: neither arguments nor paths nor the environment can contain one.
        """
        own = (__file__, self.sandbox_id, self.namespace, self.address, self.bundle, self.socket_path)
        rest = (self.options.hex(), "debug" if self.is_debug else "")
        environment = (b"=".join(pair) for pair in os.environb.items())
        return b"\0".join((*map(os.fsencode, (*own, *rest)), *environment))

    @classmethod
    def decode(cls, data: bytes) -> tuple[Launch, dict[bytes, bytes]]:
        """Return what a ``start`` of this very code has encoded, and its environment.

        Raises:
            ValueError: it is malformed, or from a program that is installed elsewhere.
        """
        code, *own, options, debug = map(os.fsdecode, data.split(b"\0", _FIELDS)[:_FIELDS])
        if code != __file__:
            raise ValueError(f"the caller's code is {code!r}, this is {__file__!r}")
        sandbox_id, namespace, address, bundle, socket_path = own
        launch = cls(
            sandbox_id=names.checked_id(sandbox_id),
            namespace=namespace,
            address=address,
            bundle=bundle,
            is_debug=bool(debug),
        )
        launch.socket_path = socket_path
        launch.options = bytes.fromhex(options)
        pairs = (entry.partition(b"=") for entry in data.split(b"\0")[_FIELDS:])
        return launch, {name: value for name, _, value in pairs}


def start(launch: Launch) -> int:
    """Start the sandbox's shim and print its address; return the exit status of this process.

    Raises:
        ValueError: the container is not one that this version runs.
        OSError: the sandbox exists, or something could not be made.
    """
    _check_type(launch.bundle)
    bootstrap.greet(launch)
    with contextlib.ExitStack() as undo:
        with record.names_locked():
            _make_room(launch)
            lock = record.take(launch.sandbox_id)
        undo.callback(cleanup.clean, launch.sandbox_id, launch.bundle, launch.socket_path)
        listener = _listen(launch.socket_path)
        pid = _ask_host(launch, listener, lock) or _fork_server(launch, listener)
        listener.close()
        _write(f"{launch.bundle}/shim.pid", str(pid))
        _write(f"{launch.bundle}/address", f"unix://{launch.socket_path}")
        os.write(sys.stdout.fileno(), bootstrap.answer(launch))
        os.close(lock)
        undo.pop_all()
    return 0


def _check_type(bundle: str) -> None:
    """Refuse what needs a pod: this version runs single containers.

    Parsing JSON costs as much as starting Python, so the file is parsed only if it contains one of the keys.

    Raises:
        ValueError: the container belongs to a pod, or is the sandbox of one.
    """
    with open(f"{bundle}/config.json", "rb") as file:
        text = file.read()
    if not any(key.encode() in text for key in _TYPE_KEYS):
        return
    import json

    annotations = json.loads(text).get("annotations") or {}
    for key in _TYPE_KEYS:
        if key in annotations:
            raise ValueError(
                f"annotation {key}={annotations[key]!r}: pods are not supported yet, only single containers"
                " (run it with ctr, nerdctl or Docker, or with another RuntimeClass)"
            )


def _make_room(launch: Launch) -> None:
    """Clean up after a shim that died with the sandbox's name.

    Raises:
        FileExistsError: it lives.
    """
    sandbox_id = launch.sandbox_id
    if not os.path.lexists(paths.sandbox_dir(sandbox_id)):
        return
    if record.is_served(sandbox_id):
        owner = record.read(sandbox_id) or {}
        raise FileExistsError(
            f"sandbox {sandbox_id} runs already, for bundle {owner.get('bundle', '(starting)')} in namespace "
            f"{owner.get('namespace', '(starting)')}; ids are unique per host (choose another id): already exists"
        )
    cleanup.clean(sandbox_id, launch.bundle, launch.socket_path)


def _listen(path: str) -> _Socket:
    """Return a listener that only root can connect to. Whoever holds the sandbox's name may replace its socket."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = _Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(128)
    return listener


def _ask_host(launch: Launch, listener: _Socket, lock: int) -> int:
    """Have the host fork the server; return its pid, or 0 if it has not and will not."""
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (listener.fileno(), lock))
    host = _Socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    try:
        host.settimeout(HOST_TIMEOUT_S)
        host.connect(paths.shim_host_socket())
        host.send(launch.encode())
        if host.recv(len(READY)) != READY:
            return 0
        host.sendmsg([READY], [(SOL_SOCKET, SCM_RIGHTS, fds)])
        host.settimeout(None)  # the server holds the other end: it answers or dies
        return int(host.recv(16))
    except (OSError, ValueError):  # no number: it is dead, or about to be, and says why
        return 0
    finally:
        host.close()


def _fork_server(launch: Launch, listener: _Socket) -> int:
    """Fork the server from this process; return its pid.

    Raises:
        OSError: it could not record itself.
    """
    reader, writer = os.pipe()

    def run() -> int:
        os.close(reader)
        return become_server(launch, listener, writer)

    detach(run)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    if not said.isdigit():
        why = os.fsdecode(said) or "it was killed"
        raise OSError(f"the shim of sandbox {launch.sandbox_id} ended before it began: {why}")
    return int(said)


def detach(run: Callable[[], int]) -> None:
    """Run something in a process that has no terminal and no parent; it ends with the status that is returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            status = run() if os.fork() == 0 else 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)


def become_server(launch: Launch, listener: _Socket, writer: int) -> int:
    """Turn the calling process, which is detached, into the sandbox's server; return its exit status at its end.

    Args:
        launch: what ``start`` was told.
        listener: where containerd connects.
        writer: where the pid is written, once the server is on record, or else why it is not; closed then.
    """
    _ignore_signals()
    try:
        record.write(launch.sandbox_id, namespace=launch.namespace, bundle=launch.bundle, socket=launch.socket_path)
    except OSError as err:
        os.write(writer, os.fsencode(str(err)))
        raise
    _redirect_streams(launch.bundle)
    os.chdir("/")
    os.write(writer, str(os.getpid()).encode())
    os.close(writer)
    return _serve(launch, listener)


def _serve(launch: Launch, listener: _Socket) -> int:
    """Ask for the VM, and only then import what serves (:mod:`procs.shim.order`)."""
    from common.errors import KataError
    from procs.shim.order import Order

    order: Order | KataError
    try:
        order = Order(launch)
    except KataError as err:
        order = err
    from procs.shim.server import serve

    return serve(launch, order, listener.detach())


def _ignore_signals() -> None:
    """Let the server end when containerd says so, and not with a terminal, a service's stop or a vanished reader."""
    import signal  # the server needs it anyway; `start` itself does not

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def _redirect_streams(bundle: str) -> None:
    """Give up the caller's standard streams; errors go to the bundle's log FIFO, which containerd reads.

    The FIFO is opened without waiting for a reader, and written to without waiting for it either.
    """
    null = os.open(os.devnull, os.O_RDWR)
    try:
        log = os.open(f"{bundle}/log", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        log = null
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for fd in {null, log}:
        os.close(fd)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
