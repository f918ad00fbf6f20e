"""The journal: what it survives, and what it does about what it cannot read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from common import paths
from common.errors import UnavailableError
from common.linux import identity
from common.services.device import Chapter, Device
from procs.device_manager import journal as journals
from procs.device_manager.journal import Journal

pytestmark = pytest.mark.usefixtures("run_dir")

CHAPTER = Chapter(at=1.0, event="wanted", state="attaching", detail="")


def device(device_id: str = "d1") -> Device:
    return Device(
        device_id=device_id, sandbox_id="s1", hypervisor="qemu", bus="b", slot=0, state="attaching", since=1.0
    )


def file() -> Path:
    return Path(paths.run_dir()) / "device-manager/journal.db"


def filled() -> None:
    with Journal() as journal:
        journal.save(device(), CHAPTER)


def test_what_was_written_is_there_for_the_next_one() -> None:
    filled()
    with Journal() as journal:
        assert journal.load() == [device()]
        journal.remove(device(), CHAPTER)
    with Journal() as journal:
        assert journal.load() == []
        story = journal.story("d1")
        assert story is not None
        assert (story.sandbox_id, story.chapters) == ("s1", (CHAPTER, CHAPTER))


def test_a_journal_belongs_to_one_process() -> None:
    with Journal(), pytest.raises(UnavailableError, match="database is locked"):
        Journal()
    filled()


def test_a_journal_of_another_boot_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    filled()
    monkeypatch.setattr(identity, "boot_id", lambda: "another")
    with Journal() as journal:
        assert journal.load() == []
        assert journal.story("d1") is None


def overwrite() -> None:
    file().write_bytes(b"no database " * 1000)


def tear() -> None:
    """Damage a page in the middle, as a disk would."""
    with file().open("r+b") as damaged:
        damaged.seek(4096)
        damaged.write(b"\xff" * 4096)


def shorten() -> None:
    file().write_bytes(file().read_bytes()[:5000])


def change_schema() -> None:
    with sqlite3.connect(file()) as database:
        database.execute("PRAGMA user_version = 1")
    database.close()


def write_nonsense() -> None:
    with sqlite3.connect(file()) as database:
        database.execute("UPDATE devices SET device = '{\"device_id\": 5}'")
    database.close()


@pytest.mark.parametrize("damage", [overwrite, tear, shorten, change_schema, write_nonsense])
def test_a_journal_that_cannot_be_read_is_moved_aside(damage: object, capsys: pytest.CaptureFixture[str]) -> None:
    filled()
    assert callable(damage)
    damage()
    with Journal() as journal:
        assert journal.load() == []
        journal.save(device("d2"), CHAPTER)
    with Journal() as journal:
        assert [row.device_id for row in journal.load()] == ["d2"]
    assert file().with_name("journal.db.damaged").exists()
    assert "journal cannot be read: begun anew" in capsys.readouterr().out


def test_history_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_CHAPTERS", 3)
    with Journal() as journal:
        for number in range(5):
            journal.save(device(f"d{number}"), CHAPTER)
        assert [journal.story(f"d{number}") is not None for number in range(5)] == [False, False, True, True, True]


def test_an_answer_is_kept_as_long_as_it_may_be_asked_for() -> None:
    with Journal() as journal:
        journal.remember("call", b"answer", seconds=60)
        journal.remember("old", b"answer", seconds=-1)
    with Journal() as journal:
        journal.remember("another", b"answer", seconds=60)
        assert journal.recall("call") == b"answer"
        assert journal.recall("old") is None
        assert journal.recall("never") is None
