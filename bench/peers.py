"""The peers that we are measured against: a bare VM of the same kind, and crun in the same guest without us."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.vm import bare_vm
from common.channel import HELLO, NONCE_SIZE
from common.protocols import oci
from common.testing.oci_image import busybox_tree
from common.ttrpc import frames
from guest.image.cpio import Archive
from procs.shim import spec
from procs.vmm_manager.drivers.qemu.channel import AGENT_SOCKET

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

_BUNDLES = {"true": ["true"], "sleeping": ["sleep", "1000000"]}
_CHECK = frames.encode(1, frames.REQUEST, frames.Request(service="grpc.Health", method="Check").encode())


def bare_boot(accelerator: str) -> float:
    """Boot the guest and nothing else; return the seconds from QEMU's start until the agent answers Health.Check."""
    began = time.monotonic()
    with bare_vm(accelerator) as vm, vm.connect(AGENT_SOCKET) as agent:
        wait_greeted(agent)
        wait_healthy(agent)
        return time.monotonic() - began


def wait_greeted(agent: socket.socket) -> None:
    """Say hello, and return when the agent has answered."""
    agent.sendall(HELLO + os.urandom(NONCE_SIZE))
    agent.recv(4096)


def wait_healthy(agent: socket.socket) -> None:
    """Ask for the agent's health, and return when it has answered."""
    agent.sendall(_CHECK)
    agent.recv(4096)


def first_crun_run(accelerator: str) -> float:
    """Return the seconds of the first ``crun run`` of a guest, as that of a cold start is."""
    with crun_in_guest(accelerator) as crun:
        return crun("run")


@contextmanager
def crun_in_guest(accelerator: str) -> Iterator[Callable[[str], float]]:
    """A guest in which crun is measured.

    Yields what takes the name of a measurement (:data:`bench.guest_crun.MEASUREMENTS`) and returns its seconds, by the
    guest's clock; it raises ValueError, with crun's status, if crun failed.
    """
    with bare_vm(accelerator, script="guest_crun", archive=_bundles()) as vm, vm.connect(AGENT_SOCKET) as port:
        answers = port.makefile()

        def seconds(measurement: str) -> float:
            port.sendall(f"{measurement}\n".encode())
            return float(answers.readline())

        with answers:
            yield seconds


def _bundles() -> Archive:
    """Return the bundles that crun runs, and the root file system that they share."""
    archive = Archive()
    for name, arguments in _BUNDLES.items():
        archive.add_file(f"/bench/{name}/config.json", _specification(name, arguments))
    files, links = busybox_tree()
    for path, data in files.items():
        archive.add_file(f"/bench/rootfs/{path}", data, 0o755)
    for path, target in links.items():
        archive.add_link(f"/bench/rootfs/{path}", target)
    for path in ("dev", "proc", "run", "sys"):
        archive.add_directory(f"/bench/rootfs/{path}")
    return archive


def _specification(container_id: str, arguments: list[str]) -> bytes:
    """Return ctr's own specification, as our shim and agent would hand it to crun."""
    config = json.loads(subprocess.run(["ctr", "oci", "spec"], check=True, capture_output=True).stdout)  # noqa: S607
    config["process"] |= {"args": arguments, "env": ["PATH=/bin"]}
    told = spec.for_guest(config, container_id, vfio_name=lambda *_: "", is_disk=lambda _: False).config
    told["root"] = {"path": "/bench/rootfs"}
    return json.dumps(oci.to_json(oci.from_json(oci.Spec, told))).encode()
