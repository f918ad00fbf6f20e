"""Upstream's agent behind our shim, and our guest behind upstream's shim.

Run by ``make test-upstream AGENT=path`` and ``make test-upstream SHIM=path``, else not collected. The agent is init of
an initrd made of ours: the kernel's modules are loaded by a few lines of Python, which then become the agent.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.image import build
from guest.image.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT = os.environ.get("PYKATA_UPSTREAM_AGENT", "")
SHIM = os.environ.get("PYKATA_UPSTREAM_SHIM", "")
_NEEDS = {"test_agent.py": AGENT, "test_vsock_daemon.py": AGENT, "test_shim.py": SHIM}
collect_ignore = [name for name, path in _NEEDS.items() if not path]

_REPOSITORY = Path(__file__).parents[2]
_NEEDED = re.compile(r"=> (?P<path>/\S+)")
_INIT = b"""#!/usr/bin/python3.11 -ISE
import sys
sys.path[:] = "/usr/lib/kata-agent", "/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload"
import posix
from guest.agent import modules
for purpose in "boot", "vsock", "vsock-device", "blk":
    modules.load(purpose)
posix.execv("/usr/bin/kata-agent", ["/usr/bin/kata-agent"])
"""


@pytest.fixture(scope="session")
def images() -> Iterator[tuple[Path, Path]]:
    """The kernel, and an initrd with upstream's agent."""
    image = build(Path(os.environ.get("PYKATA_GUEST_DIR") or _REPOSITORY / "build" / "guest"), print)
    archive = Archive()
    archive.add_file("/init", _INIT, 0o755)
    archive.add_file("/usr/bin/kata-agent", Path(AGENT).read_bytes(), 0o755)
    archive.add_file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    libraries = subprocess.run(["/usr/bin/ldd", AGENT], capture_output=True, text=True, check=False).stdout
    for found in _NEEDED.finditer(libraries):
        library = Path(found["path"])
        archive.add_file(f"/lib/x86_64-linux-gnu/{library.name}", library.read_bytes(), 0o755)
    with tempfile.NamedTemporaryFile(suffix=".img") as file:
        file.write(image.initrd.read_bytes() + archive.encode())
        file.flush()
        yield image.vmlinux, Path(file.name)
