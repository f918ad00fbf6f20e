"""What `start` says to the host, and what the host makes of it."""

from __future__ import annotations

import os

import pytest

from procs.shim import launch
from procs.shim.host_caller import _cgroup_dir
from procs.shim.launch import Launch


@pytest.fixture
def told() -> Launch:
    told = Launch(sandbox_id="x", namespace="näme", address="/a", bundle="/b\udcff", is_debug=True)
    told.options = b"\0\n\xff"
    told.socket_path = "/elsewhere"
    return told


def test_the_host_learns_all_that_start_was_told(told: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WITH", "a=b\n")
    monkeypatch.setenv("EMPTY", "")
    learnt, environment = Launch.decode(told.encode())
    for name in set(Launch.__slots__) - {"has_params"}:
        assert getattr(learnt, name) == getattr(told, name)
    assert environment == dict(os.environb)
    assert environment[b"WITH"] == b"a=b\n"
    assert environment[b"EMPTY"] == b""


def test_what_is_malformed_is_refused(told: Launch) -> None:
    fields = told.encode().split(b"\0")[:8]
    assert Launch.decode(b"\0".join(fields))[1] == {}
    for wrong in (fields[:7], [*fields[:6], b"odd", *fields[7:]], [b"/" + fields[0], *fields[1:]]):
        with pytest.raises(ValueError, match=r"not enough|hexadecimal|the caller's code is"):
            Launch.decode(b"\0".join(wrong))
    assert fields[0].decode() == launch.__file__


def test_a_cgroup_that_is_not_mounted_cannot_be_entered() -> None:
    with pytest.raises(FileNotFoundError, match="/x of hierarchy 'nothing' is not mounted here"):
        _cgroup_dir("nothing", "/x")
    assert _cgroup_dir("", "/x").endswith("/x")
