"""The agent imports C modules, its own, and nothing that costs the guest time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
ALLOWED = {"__future__", "encodings", "struct"}
"""Modules of the standard library that are read from files; all others that are imported are built in or frozen."""


def imported_by(*modules: str) -> set[str]:
    """Return the modules that come from files, as in the guest: without `site` and its environment."""
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); sys.dont_write_bytecode = True\n"
        f"for name in {modules!r}: __import__(name)\n"
        "print(*(name for name, module in sys.modules.items() if getattr(module.__spec__, 'has_location', False)))"
    )
    command = [sys.executable, "-ISE", "-c", script]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_agent_reads_three_modules_of_the_standard_library() -> None:
    agent = (REPOSITORY / "guest" / "agent").glob("[a-z]*.py")
    imported = imported_by(*(f"guest.agent.{path.stem}" for path in agent))
    theirs = {name for name in imported if not name.startswith(("guest", "common"))}
    assert {name.partition(".")[0] for name in theirs} - {"_ctypes"} == ALLOWED
