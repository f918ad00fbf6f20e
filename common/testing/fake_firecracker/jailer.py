"""Started as Firecracker's jailer is: it checks what the real one checks, and execs in the root that it made.

The process stays root and in the host's file system, since the fake Firecracker is a Python program; the fake looks at
owners and modes instead, as the jail's user would meet them.

Source: docs/jailer.md and src/jailer/src/env.rs of Firecracker 1.16.1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

_DEVICES = {"dev/kvm": (10, 232), "dev/net/tun": (10, 200), "dev/urandom": (1, 9)}


def main(argv: list[str]) -> None:
    """Make the jail and become Firecracker."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("id", "exec-file", "uid", "gid", "chroot-base-dir"):
        parser.add_argument(f"--{name}", required=True)
    split = argv.index("--") if "--" in argv else len(argv)
    given, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        raise SystemExit("Error: Invalid instance ID: Invalid char")
    program = Path(given.exec_file).resolve()
    if "firecracker" not in program.name:
        raise SystemExit(f'Error: Invalid filename. It must contain "firecracker": {program.name}')
    root = Path(given.chroot_base_dir).resolve() / program.name / given.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, root)
    uid, gid = int(given.uid), int(given.gid)
    for name in ("", "dev", "dev/net", "run"):
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(0o700)
        os.chown(root / name, uid, gid)
    for name, number in _DEVICES.items():
        os.mknod(root / name, 0o020600, os.makedev(*number))
        os.chown(root / name, uid, gid)
    (root / f"{program.name}.pid").write_text(str(os.getpid()))
    os.chdir(root)
    started = str(time.monotonic_ns() // 1000)
    os.execv(root / program.name, [program.name, "--id", given.id, "--start-time-us", started, *extra])  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
