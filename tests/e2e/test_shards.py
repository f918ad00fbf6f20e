"""Several device managers under supervisord, as `KATA_DEVICE_MANAGER_SHARDS` says."""

from __future__ import annotations

from common import shards
from common.testing.containers import new_name
from common.testing.isolation import variable
from common.testing.stack import IMAGE, RUNTIME, Stack


def name_for(shard: int) -> str:
    """Return a new name of a sandbox that one of two shards gets."""
    with variable(shards.VARIABLE, "2"):
        return next(name for name in iter(new_name, "") if shards.of(name) == shards.service_name(shard))


def run(stack: Stack, name: str) -> bytes:
    return stack.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, name, "echo", "ran", check=True).stdout


def test_two_share_a_hosts_sandboxes() -> None:
    with Stack(device_managers=2) as stack:
        names = [name_for(shard) for shard in range(2)]
        assert [run(stack, name) for name in names] == [b"ran\n"] * 2
        logs = [(stack.run_dir / f"log/device-manager-{shard}.log").read_text() for shard in range(2)]
        assert [[name in log for name in names] for log in logs] == [[True, False], [False, True]]
        stack.supervisorctl("restart", "device-manager:*")
        stack.wait_ready()
        assert run(stack, name_for(1)) == b"ran\n"
    assert stack.left_behind == []
