"""What ``start`` and ``delete`` import: containerd waits for both, and for little else as often."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAVY = {
    "asyncio", "dataclasses", "enum", "google.protobuf", "inspect", "json", "logging", "msgpack", "msgspec", "pathlib",
    "re", "selectors", "socket", "structlog", "subprocess", "typing", "zmq",
}  # fmt: skip

# The program with the arguments that follow. The server says what was imported before it and ends; so does the caller.
PROGRAM = """
import sys
before = set(sys.modules)
import os

def say(path):
    with open(path, "w") as file:
        file.write(" ".join(set(sys.modules) - before))

def serve(launch, listener):
    say("SERVER")
    return 0

from procs.shim import cli
if "start" in sys.argv:
    from procs.shim import launch
    launch._serve = serve
status = cli.main()
say("CALLER")
sys.exit(status)
"""


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    (path / "config.json").write_text(json.dumps({"process": {"args": ["true"]}}))
    yield path
    execute(path, "delete")
    shutil.rmtree(path)


def execute(root: Path, action: str) -> subprocess.CompletedProcess[bytes]:
    flags = [
        "-namespace",
        "test",
        "-address",
        str(root / "c.sock"),
        "-id",
        root.name.removeprefix("kt-").replace("_", "x"),
        "-bundle",
        str(root),
        action,
    ]
    return subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            PROGRAM.replace("SERVER", f"{root}/server").replace("CALLER", f"{root}/caller"),
            *flags,
        ],
        cwd=root,
        env={**os.environ, "PYKATA_RUN_DIR": str(root / "run")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def test_delete_imports_nothing_heavy(root: Path) -> None:
    done = execute(root, "delete")
    assert (done.returncode, done.stderr) == (0, b"")
    imported = set((root / "caller").read_text().split())
    assert "procs.shim.cleanup" in imported
    assert imported.isdisjoint(HEAVY)


def test_start_imports_nothing_heavy_until_the_server_begins(root: Path) -> None:
    os.mkfifo(root / "server")
    done = execute(root, "start")
    assert (done.returncode, done.stderr) == (0, b"")
    server, caller = ((root / name).read_text().split() for name in ("server", "caller"))
    assert "procs.shim.launch" in caller
    assert HEAVY.isdisjoint(caller)
    assert "procs.shim.launch" in server
    assert (HEAVY - {"enum"}).isdisjoint(server), "signal makes enums, and asyncio imports it next"


def test_the_vm_is_asked_for_without_asyncio_and_logging() -> None:
    program = "import sys; import procs.shim.order; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert {"asyncio", "logging", "structlog", "ssl"}.isdisjoint(done.stdout.split())
