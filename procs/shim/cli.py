"""``containerd-shim-kata-v2``: what containerd executes.

containerd runs ``containerd-shim-kata-v2 [flags] start|delete`` in the bundle for every container, so this must be
quick: nothing here imports ``typing``, ``json``, ``socket`` or ``asyncio``. ``start`` returns twice: in the process
that containerd waits for, and in the forked server, which imports the rest (:mod:`procs.shim.launch`).

Flags are Go's: ``-name value``, ``-name=value``, with one dash or two; a flag that we do not know is skipped, since a
newer containerd may pass more. Source: containerd v1.6.20, ``runtime/v2/shim/shim.go``, ``parseFlags``.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RUNTIME_NAME = "io.containerd.kata.v2"

_VALUED = ("namespace", "address", "publish-binary", "id", "bundle", "socket")
_SWITCHES = ("debug", "v", "version", "info")


class Invocation:
    """What the command line says.

    Attributes:
        values: flags that take a value, by name; empty if absent.
        switches: names of the switches that are set.
        action: ``start``, ``delete`` or empty.
    """

    __slots__ = ("action", "switches", "values")

    def __init__(self, arguments: list[str]) -> None:
        self.values = dict.fromkeys(_VALUED, "")
        self.switches: set[str] = set()
        self.action = ""
        rest = iter(arguments)
        for argument in rest:
            if not argument.startswith("-"):
                self.action = argument
                continue
            name, has_value, value = argument.lstrip("-").partition("=")
            if name in _VALUED:
                self.values[name] = value if has_value else next(rest, "")
            elif name in _SWITCHES and value not in ("false", "0"):
                self.switches.add(name)


def main() -> int:
    """Do what the command line says; return the exit status."""
    invocation = Invocation(sys.argv[1:])
    if "info" in invocation.switches:
        return _info()
    if invocation.switches & {"v", "version"}:
        return _version()
    action = _ACTIONS.get(invocation.action)
    if action is None:
        return _fail(f"unknown action {invocation.action!r} (containerd runs this program with start or delete)")
    try:
        return action(invocation)
    except (OSError, ValueError) as err:
        return _fail(str(err))


def _start(invocation: Invocation) -> int:
    from procs.shim import launch, names

    values = invocation.values
    return launch.start(
        launch.Launch(
            sandbox_id=names.checked_id(values["id"]),
            namespace=values["namespace"],
            address=values["address"],
            bundle=os.getcwd(),
            is_debug="debug" in invocation.switches,
        )
    )


def _delete(invocation: Invocation) -> int:
    from procs.shim import cleanup, names

    values = invocation.values
    socket_path = names.socket_path(values["address"], values["namespace"], values["id"])
    response = cleanup.delete(names.checked_id(values["id"]), values["bundle"] or os.getcwd(), socket_path)
    _print(response)
    return 0


def _version() -> int:
    _print(f'pykata containerd shim: id: "{RUNTIME_NAME}", version: {_release()}\n'.encode())
    return 0


def _info() -> int:
    from procs.shim import introspection

    _print(introspection.info(RUNTIME_NAME, _release()))
    return 0


def _release() -> str:
    from importlib.metadata import version

    return version("pykata")


def _print(data: bytes) -> None:
    os.write(sys.stdout.fileno(), data)


def _fail(message: str) -> int:
    """Say why on standard error, which containerd adds to its own error."""
    os.write(sys.stderr.fileno(), f"{message}\n".encode(errors="replace"))
    return 1


_ACTIONS: dict[str, Callable[[Invocation], int]] = {"start": _start, "delete": _delete}
