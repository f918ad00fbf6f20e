"""configuration.toml: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import toml

from common import config
from common.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def qemu_section(tmp_path: Path) -> dict[str, object]:
    """A ``[hypervisor.qemu]`` whose files exist."""
    files = {key: tmp_path / key for key in ("path", "kernel", "initrd", "virtio_fs_daemon")}
    for file in files.values():
        file.touch()
    return {key: str(file) for key, file in files.items()}


def written(tmp_path: Path, content: dict[str, object]) -> str:
    file = tmp_path / "configuration.toml"
    file.write_text(toml.dumps(content))
    return str(file)


def test_reads_upstreams_sections(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    path = written(
        tmp_path,
        {
            "hypervisor": {"qemu": {**qemu_section, "default_memory": 512, "virtio_fs_extra_args": ["-d"]}},
            "agent": {"kata": {"dial_timeout": 7}},
            "runtime": {"create_container_timeout": 9},
        },
    )
    loaded = config.load(path)
    assert loaded.source == path
    assert loaded.qemu.default_memory == 512
    assert loaded.qemu.virtio_fs_extra_args == ("-d",)
    assert (loaded.agent.dial_timeout, loaded.runtime.create_container_timeout) == (7, 9)
    assert loaded.ignored == ()


def test_defaults_are_upstreams(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    loaded = config.load(written(tmp_path, {"hypervisor": {"qemu": qemu_section}}))
    assert (loaded.qemu.default_memory, loaded.qemu.default_vcpus) == (2048, 1)
    assert (loaded.agent.dial_timeout, loaded.runtime.create_container_timeout) == (45, 60)


def test_unused_keys_are_named_not_refused(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    content = {
        "hypervisor": {"qemu": {**qemu_section, "msize_9p": 8192}, "clh": {"path": "/x"}},
        "runtime": {"vfio_mode": "guest-kernel"},
        "factory": {"enable_template": True},
    }
    loaded = config.load(written(tmp_path, content))
    assert set(loaded.ignored) == {"hypervisor.qemu.msize_9p", "hypervisor.clh", "runtime.vfio_mode", "factory"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"default_memory": "much"}, "hypervisor.qemu.default_memory"),
        ({"default_memory": 100}, "default_memory = 100 MiB is too small"),
        ({"default_vcpus": 0}, "default_vcpus = 0 is not possible here"),
        ({"default_vcpus": 100_000}, "default_vcpus = 100000 is not possible here"),
        ({"kernel": "/nowhere/vmlinux"}, "hypervisor.qemu.kernel = '/nowhere/vmlinux' is not a file"),
        ({"initrd": ""}, "hypervisor.qemu.initrd = '' is not a file"),
        ({"machine_type": "microvm"}, "machine_type = 'microvm' is not supported"),
    ],
)
def test_a_bad_value_is_named_with_file_key_and_value(
    tmp_path: Path, qemu_section: dict[str, object], change: dict[str, object], said: str
) -> None:
    path = written(tmp_path, {"hypervisor": {"qemu": {**qemu_section, **change}}})
    with pytest.raises(UsageError) as refused:
        config.load(path)
    assert path in refused.value.message
    assert said in refused.value.message
    assert refused.value.hint


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text("[runtime]\nenable_debug = maybe\n")
    with pytest.raises(UsageError, match=r"configuration .*configuration\.toml is not valid TOML: .*line 2"):
        config.load(str(file))


def test_a_configuration_without_a_hypervisor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hypervisor"):
        config.load(written(tmp_path, {"runtime": {}}))


def test_find_prefers_what_was_asked_and_names_what_it_tried(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.touch()
    assert config.find(str(file)) == str(file)
    with pytest.raises(UsageError, match=r"cannot find usable config file \(/nowhere/c\.toml\)"):
        config.find("/nowhere/c.toml")
