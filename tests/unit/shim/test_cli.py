"""The command line: Go's flags, ids, sockets, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.protocols.bootstrap import RuntimeInfo
from procs.shim import names
from procs.shim.cli import Invocation

PROGRAM = Path(sys.executable).parent / "containerd-shim-kata-v2"


def test_flags_are_gos() -> None:
    line = "-namespace k8s.io --address=/run/c.sock -publish-binary /bin/containerd -id abc -debug start"
    invocation = Invocation(line.split())
    assert invocation.values["namespace"] == "k8s.io"
    assert invocation.values["address"] == "/run/c.sock"
    assert invocation.values["publish-binary"] == "/bin/containerd"
    assert invocation.values["id"] == "abc"
    assert invocation.values["bundle"] == ""
    assert (invocation.switches, invocation.action) == ({"debug"}, "start")


def test_switches_can_be_off_and_unknown_flags_are_skipped() -> None:
    invocation = Invocation(["-debug=false", "-sched-core", "-some=thing", "-id", "x", "delete"])
    assert (invocation.switches, invocation.action) == (set(), "delete")
    assert invocation.values["id"] == "x"


@pytest.mark.parametrize("good", ["a", "redis-1", "a.b_c-d", "A1", "x" * 76])
def test_ids_that_containerd_allows(good: str) -> None:
    assert names.checked_id(good) == good


@pytest.mark.parametrize("bad", ["", "-a", "a-", "a--b", "a/b", "..", "a b", "é", "x" * 77, "a\n"])
def test_ids_that_could_be_something_else_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"container id .* is not valid"):
        names.checked_id(bad)


def test_the_socket_is_containerds_own_choice() -> None:
    path = names.socket_path("/run/containerd/containerd.sock", "default", "redis")
    # printf /run/containerd/containerd.sock/default/redis | sha256sum
    assert path == "/run/containerd/s/f6b99128c07bdbd0902363ba979c22f8ef053e683a7ce24dd016a1ab17092c33"


def test_version_and_info() -> None:
    version = subprocess.run([PROGRAM, "-v"], capture_output=True, text=True, check=True).stdout
    assert version.startswith('pykata containerd shim: id: "io.containerd.kata.v2", version: ')
    info = RuntimeInfo.decode(subprocess.run([PROGRAM, "-info"], capture_output=True, check=True).stdout)
    assert info.name == "io.containerd.kata.v2"
    assert info.version is not None
    assert info.version.version in version
    assert info.features is not None
    features = json.loads(info.features.value)
    assert features["linux"]["seccomp"] == {"enabled": False}
    assert {"prestart", "createRuntime"} < set(features["hooks"])
    assert {"ro", "nosuid", "rbind"} < set(features["mountOptions"])
    assert info.annotations == {"containerd.io/runtime-allow-mounts": "erofs,format/*,mkdir/*"}


def test_an_unknown_action_is_an_error() -> None:
    done = subprocess.run([PROGRAM, "-id", "x", "frob"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown action 'frob'" in done.stderr
