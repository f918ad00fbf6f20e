"""What no two sandboxes may have: claimed across shards, kept and given back whoever dies."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from common import paths
from common.errors import AlreadyExistsError, UnavailableError
from common.linux import identity
from common.services.device import Device
from common.services.vmm import BlockSpec, ShareSpec, VfioSpec, VsockSpec
from procs.device_manager.claims import Claims

pytestmark = pytest.mark.usefixtures("run_dir")


def disk(device_id: str, sandbox_id: str, *, is_read_only: bool = False, backing: str = "file 1:1") -> Device:
    return Device(
        device_id=device_id,
        sandbox_id=sandbox_id,
        hypervisor="qemu",
        bus="b",
        slot=0,
        state="attaching",
        since=1.0,
        spec=BlockSpec(source="/disk", is_read_only=is_read_only),
        backing=backing,
    )


def file() -> Path:
    return Path(paths.run_dir()) / "device-manager/claims.db"


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_a_disk_that_is_written_is_one_sandboxs_in_whichever_shard(first: bool, second: bool, is_refused: bool) -> None:
    with Claims("device") as one, Claims("device.1") as other:
        one.take(disk("d1", "s1", is_read_only=first))
        wanted = disk("d2", "s2", is_read_only=second)
        if is_refused:
            with pytest.raises(AlreadyExistsError, match="/disk is held by device d1 of sandbox s1"):
                other.take(wanted)
            one.drop("d1")
        other.take(wanted)
        assert other.sandboxes("qemu") == {"s2"}


def test_a_vsock_address_is_one_sandboxs() -> None:
    def device(number: int, sandbox_id: str) -> Device:
        spec = VsockSpec(cid=77)
        return msgspec.structs.replace(disk(f"d{number}", sandbox_id, backing=spec.source), spec=spec)

    with Claims("device") as one, Claims("device.1") as other:
        one.take(device(1, "s1"))
        with pytest.raises(AlreadyExistsError, match="vsock address 77 is held by device d1 of sandbox s1"):
            other.take(device(2, "s2"))
        one.drop("d1")
        other.take(device(2, "s2"))


def test_an_iommu_group_is_one_sandboxs_with_all_its_devices() -> None:
    def device(number: int, sandbox_id: str) -> Device:
        spec = VfioSpec(source=f"0000:3b:00.{number}")
        backing = f"iommu-group 12/{spec.source}"
        return msgspec.structs.replace(disk(f"d{number}", sandbox_id, backing=backing), spec=spec)

    with Claims("device") as one, Claims("device.1") as other:
        one.take(device(0, "s1"))
        one.take(device(1, "s1"))
        with pytest.raises(AlreadyExistsError, match=r"0000:3b:00.2 is held by device d[01] of sandbox s1"):
            other.take(device(2, "s2"))
        one.drop("d0")
        with pytest.raises(AlreadyExistsError, match=r"0000:3b:00.2 is held by device d1 of sandbox s1"):
            other.take(device(2, "s2"))
        one.drop("d1")
        other.take(device(2, "s2"))


def test_another_disk_another_time_and_what_is_no_disk_are_in_nobodys_way() -> None:
    with Claims("device") as one, Claims("device.1") as other:
        one.take(disk("d1", "s1"))
        one.take(disk("d1", "s1"))
        other.take(disk("d2", "s2", backing="file 1:2"))
        share = msgspec.structs.replace(disk("d3", "s2"), spec=ShareSpec(source="/", tag="t"))
        other.take(share)
        assert (one.sandboxes("qemu"), one.sandboxes("other")) == ({"s1"}, set())


def test_a_stray_is_dropped_by_its_own_shard_alone() -> None:
    with Claims("device") as one:
        one.take(disk("d1", "s1"))
    with Claims("device") as one, Claims("device.1") as other:
        other.drop_strays("s1", [])
        with pytest.raises(AlreadyExistsError):
            other.take(disk("d2", "s2"))
        one.drop_strays("s1", [disk("d1", "s1")])
        assert one.sandboxes("qemu") == {"s1"}, "it has a device"
        one.drop_strays("s1", [])
        other.take(disk("d2", "s2"))


def test_claims_of_another_boot_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Claims() as claims:
        claims.take(disk("d1", "s1"))
    monkeypatch.setattr(identity, "boot_id", lambda: "another")
    with Claims() as claims:
        assert claims.sandboxes("qemu") == set()


def test_what_cannot_be_read_is_made_anew_by_who_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Claims() as claims:
        claims.take(disk("d1", "s1"))
    file().write_bytes(b"no database " * 1000)
    with Claims() as claims:
        claims.restore([disk("d1", "s1")])
        assert claims.sandboxes("qemu") == {"s1"}
    assert file().with_name("claims.db.damaged").exists()
    assert "claims cannot be read: begun anew" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_to_those_who_have_it_open() -> None:
    with Claims("device") as claims:
        claims.take(disk("d1", "s1"))
    with Claims("device"):
        file().write_bytes(b"no database " * 1000)
        with pytest.raises(UnavailableError, match=r"cannot read .*claims.db: .*restart device-manager"):
            Claims("device.1")
        assert not file().with_name("claims.db.damaged").exists()
