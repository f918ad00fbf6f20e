"""OCI hooks on the host, seccomp and devices: what of a configuration is done where."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import KataError
from common.protocols import agent
from common.testing.shim_client import started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand


def configure(stand: ShimStand, **changes: Any) -> None:  # noqa: ANN401  # JSON
    """Change sections of the bundle's configuration."""
    path = stand.bundle / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hook(stand: ShimStand, name: str, script: str, **fields: object) -> dict[str, object]:
    """Write a hook that runs a script; return its configuration."""
    path = stand.root / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"path": str(path), **fields}


def note(stand: ShimStand, name: str) -> dict[str, object]:
    """A hook that notes its name and the state that it is told."""
    return hook(stand, name, f"echo {name} >> {stand.root}/order; cat > {stand.root}/{name}.state")


@stand_test
async def test_hooks_run_on_the_host_in_their_order(stand: ShimStand) -> None:
    stages = ("prestart", "createRuntime", "poststart", "poststop")
    configure(stand, hooks={stage: [note(stand, stage)] for stage in stages}, annotations={"a": "b"})
    shim = await started(stand)
    pid = await shim.create("true")
    await shim.start()
    await shim.wait()
    await shim.delete()
    assert (stand.root / "order").read_text().split() == list(stages)
    states = [json.loads((stand.root / f"{stage}.state").read_text()) for stage in stages]
    assert [state.pop("status") for state in states] == ["creating", "creating", "running", "stopped"]
    told = {"ociVersion": "1.0.2", "id": stand.id, "pid": pid, "bundle": str(stand.bundle), "annotations": {"a": "b"}}
    assert states == [told] * 4
    assert stand.vms.guest is not None
    created = next(request for _, request in stand.vms.guest.calls if isinstance(request, agent.CreateContainerRequest))
    assert created.oci is not None
    assert created.oci.hooks is None


@stand_test
async def test_a_hook_has_its_arguments_and_environment_and_no_other(stand: ShimStand) -> None:
    shown = hook(stand, "show", f'echo "$0 $* $A $HOME" > {stand.root}/shown', args=["me", "x"], env=["A=one=two"])
    configure(stand, hooks={"prestart": [shown]})
    shim = await started(stand)
    await shim.create("true")
    assert (stand.root / "shown").read_text().split() == [f"{stand.root}/show", "x", "one=two"]


@pytest.mark.parametrize(
    ("script", "fields", "said"),
    [
        ("echo no network >&2; exit 3", {}, "ended with status 3: no network"),
        ("exec sleep 1000", {"timeout": 1}, "Hook timeout"),
    ],
)
def test_a_hook_that_fails_before_the_start_fails_the_creation(
    script: str, fields: dict[str, object], said: str
) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        configure(stand, hooks={"createRuntime": [hook(stand, "bad", script, **fields), note(stand, "later")]})
        shim = await started(stand)
        with pytest.raises(KataError, match=said):
            await shim.create("true")
        assert not (stand.root / "order").exists()
        await shim.shutdown()
        await stand.wait_shim_gone()
        assert stand.leftovers() == []

    test()


@stand_test
async def test_a_hook_that_is_not_there_is_named(stand: ShimStand) -> None:
    configure(stand, hooks={"prestart": [{"path": "/no/such/hook"}]})
    shim = await started(stand)
    with pytest.raises(KataError, match="hook /no/such/hook cannot be executed: No such file"):
        await shim.create("true")


@stand_test
async def test_a_hook_that_fails_later_is_logged(stand: ShimStand) -> None:
    failing = {stage: [hook(stand, stage, f"echo {stage} failed; exit 1")] for stage in ("poststart", "poststop")}
    configure(stand, hooks=failing)
    shim = await started(stand)
    await shim.create("true")
    await shim.start()
    await shim.wait()
    await shim.delete()
    log = stand.log()
    assert "poststart failed" in log
    assert "poststop failed" in log


@pytest.mark.parametrize("is_disabled", [True, False])
def test_seccomp_goes_to_the_guest_as_it_is_configured(is_disabled: bool) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        text = stand.config.read_text() + f"[runtime]\ndisable_guest_seccomp = {str(is_disabled).lower()}\n"
        stand.config.write_text(text)
        configure(stand, linux={"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}})
        shim = await started(stand)
        await shim.create("true")
        assert stand.vms.guest is not None
        request = next(call for _, call in stand.vms.guest.calls if isinstance(call, agent.CreateContainerRequest))
        assert request.oci is not None
        assert request.oci.linux is not None
        assert (request.oci.linux.seccomp is None) == is_disabled

    test()


@stand_test
async def test_the_guest_is_told_where_its_hooks_are(stand: ShimStand) -> None:
    text = stand.config.read_text().replace(
        "[hypervisor.qemu]", '[hypervisor.qemu]\nguest_hook_path = "/usr/share/oci"'
    )
    stand.config.write_text(text)
    shim = await started(stand)
    await shim.create("true")
    assert stand.vms.guest is not None
    request = next(call for _, call in stand.vms.guest.calls if isinstance(call, agent.CreateSandboxRequest))
    assert request.guest_hook_path == "/usr/share/oci"
