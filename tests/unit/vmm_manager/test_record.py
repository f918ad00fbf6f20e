"""vm.json: what a manager finds of the one before it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from common import paths
from common.errors import AlreadyExistsError
from common.processes import ProcessIdentity
from common.services.vmm import AddDevice, ShareSpec
from procs.vmm_manager.record import DeviceRecord, VmRecord, load_all

SANDBOX = "s1"
DEVICE = DeviceRecord(
    bus="port0",
    slot=0,
    serial="0f",
    spec=ShareSpec(source="/share", tag="kataShared"),
    daemon=ProcessIdentity(pid=7, start_time=8, boot_id="b"),
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    made = Path(paths.vm_dir(SANDBOX))
    made.mkdir(parents=True)
    return made


def test_a_record_is_found_as_it_was_saved() -> None:
    record = VmRecord(sandbox_id=SANDBOX, request_id="r", next_device=4, devices={"share-3": DEVICE})
    record.save()
    assert list(load_all()) == [record]


def test_a_record_is_replaced_as_a_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VmRecord(sandbox_id=SANDBOX, next_device=1).save()

    def crash(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(InterruptedError):
        VmRecord(sandbox_id=SANDBOX, next_device=2).save()
    assert [record.next_device for record in load_all()] == [1]
    assert sorted(file.name for file in directory.iterdir()) == ["vm.json", "vm.json.new"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"sandbox_id": 1}', b"[]"])
def test_what_cannot_be_read_counts_as_half_made(directory: Path, content: bytes) -> None:
    (directory / "vm.json").write_bytes(content)
    assert list(load_all()) == [VmRecord(sandbox_id=SANDBOX)]


def test_a_device_is_entered_once_under_a_name_of_its_own_and_found_by_serial() -> None:
    record = VmRecord(sandbox_id=SANDBOX)
    spec = ShareSpec(source="/share", tag="kataShared")
    request = AddDevice(sandbox_id=SANDBOX, spec=spec, bus="port0", slot=0, serial="0f")
    assert record.enter(request, "share-") == record.name_of("0f") == "share-1"
    assert list(load_all()) == [record], "before the hypervisor hears of it"
    with pytest.raises(AlreadyExistsError, match="slot 0 of hotplug bus port0 holds share-1"):
        record.enter(msgspec.structs.replace(request, serial="10"), "share-")
    assert record.name_of("10") is None
    del record.devices["share-1"]
    assert record.enter(request, "share-") == "share-2"


def test_a_sandbox_without_a_vm_has_no_record() -> None:
    assert list(load_all()) == []
