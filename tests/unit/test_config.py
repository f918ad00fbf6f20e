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
    assert loaded.hypervisor.default_memory == 512
    assert isinstance(loaded.hypervisor, config.QemuConfig)
    assert loaded.hypervisor.virtio_fs_extra_args == ("-d",)
    assert (loaded.agent.dial_timeout, loaded.runtime.create_container_timeout) == (7, 9)
    assert loaded.ignored == ()


def test_defaults_are_upstreams(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    loaded = config.load(written(tmp_path, {"hypervisor": {"qemu": qemu_section}}))
    assert (loaded.hypervisor.default_memory, loaded.hypervisor.default_vcpus) == (2048, 1)
    assert (loaded.agent.dial_timeout, loaded.runtime.create_container_timeout) == (45, 60)


def test_unused_keys_are_named_not_refused(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    content = {
        "hypervisor": {"qemu": {**qemu_section, "msize_9p": 8192}},
        "runtime": {"internetworking_model": "none"},
        "factory": {"enable_template": True},
    }
    loaded = config.load(written(tmp_path, content))
    assert set(loaded.ignored) == {"hypervisor.qemu.msize_9p", "runtime.internetworking_model", "factory"}


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
        ({"hot_plug_vfio": "switch-port"}, "hot_plug_vfio = 'switch-port' is not supported"),
        ({"cold_plug_vfio": "switch-port"}, "cold_plug_vfio = 'switch-port' is not supported"),
        (
            {"hot_plug_vfio": "bridge-port", "cold_plug_vfio": "bridge-port"},
            "cold_plug_vfio = 'bridge-port' with hot_plug_vfio = 'bridge-port' says it twice",
        ),
        ({"hot_plug_vfio": "root-port"}, "hot_plug_vfio = 'root-port' needs a root port"),
        ({"vhost_user_vsock_daemon": "/nowhere/v"}, "vhost_user_vsock_daemon = '/nowhere/v' is not a file"),
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


def test_a_container_cannot_drive_a_device_of_the_host_itself(tmp_path: Path, qemu_section: dict[str, object]) -> None:
    path = written(tmp_path, {"hypervisor": {"qemu": qemu_section}, "runtime": {"vfio_mode": "vfio"}})
    with pytest.raises(UsageError, match="vfio_mode = 'vfio' is not supported: guests have no IOMMU") as refused:
        config.load(path)
    assert refused.value.hint == 'set it to "guest-kernel": the guest\'s kernel drives devices of the host'


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text("[runtime]\nenable_debug = maybe\n")
    with pytest.raises(UsageError, match=r"configuration .*configuration\.toml is not valid TOML: .*line 2"):
        config.load(str(file))


def test_a_configuration_without_a_hypervisor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hypervisor"):
        config.load(written(tmp_path, {"runtime": {}}))


@pytest.mark.parametrize(
    ("hypervisors", "said"),
    [
        ({}, r"has no \[hypervisor\.…\]"),
        ({"qemu": {}, "clh": {}}, r"has \[hypervisor\.qemu\] and \[hypervisor\.clh\]"),
        ({"acrn": {}}, r"has \[hypervisor\.acrn\]"),
    ],
)
def test_exactly_one_section_says_which_hypervisor(tmp_path: Path, hypervisors: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        config.load(written(tmp_path, {"hypervisor": hypervisors}))
    assert refused.value.hint == (
        "exactly one of [hypervisor.qemu], [hypervisor.clh], [hypervisor.firecracker] says which VM it is"
    )


@pytest.mark.parametrize(
    ("section", "count", "ports"),
    [
        ({"cold_plug_vfio": "root-port"}, 3, 3),
        ({"cold_plug_vfio": "root-port", "pcie_root_port": 4}, 3, 4),
        ({"cold_plug_vfio": "root-port"}, 20, 16),
        ({"cold_plug_vfio": "bridge-port"}, 3, 0),
    ],
)
def test_devices_that_a_guest_boots_with_have_as_many_root_ports(
    tmp_path: Path, qemu_section: dict[str, object], section: dict[str, object], count: int, ports: int
) -> None:
    path = written(tmp_path, {"hypervisor": {"qemu": {**qemu_section, **section}}})
    given = config.load(path).hypervisor.with_root_ports(count)
    assert isinstance(given, config.QemuConfig)
    assert given.pcie_root_port == ports


@pytest.fixture
def clh_section(qemu_section: dict[str, object]) -> dict[str, object]:
    """A ``[hypervisor.clh]`` whose files exist."""
    return qemu_section


def test_the_section_is_the_choice(tmp_path: Path, clh_section: dict[str, object]) -> None:
    loaded = config.load(written(tmp_path, {"hypervisor": {"clh": {**clh_section, "machine_type": "q35"}}}))
    assert isinstance(loaded.hypervisor, config.ClhConfig)
    assert loaded.hypervisor.name == "clh"
    assert (loaded.hypervisor.virtio_fs_queue_size, loaded.hypervisor.hypervisor_loglevel) == (1024, 1)
    assert loaded.ignored == ("hypervisor.clh.machine_type",), "that is QEMU's"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_device_driver": "virtio-scsi"}, "block_device_driver = 'virtio-scsi' is not supported"),
        ({"hypervisor_loglevel": 4}, "hypervisor_loglevel = 4 is not possible"),
        ({"virtio_fs_queue_size": 1000}, "virtio_fs_queue_size = 1000 is not possible"),
        ({"default_bridges": 97}, "default_bridges = 97 is not possible"),
        ({"virtio_fs_daemon": "/nowhere"}, "hypervisor.clh.virtio_fs_daemon = '/nowhere' is not a file"),
        ({"hot_plug_vfio": "bridge-port"}, "hot_plug_vfio = 'bridge-port' is not supported"),
        ({"cold_plug_vfio": "root-port"}, "cold_plug_vfio = 'root-port' is not supported"),
    ],
)
def test_what_cloud_hypervisor_cannot_is_refused(
    tmp_path: Path, clh_section: dict[str, object], change: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        config.load(written(tmp_path, {"hypervisor": {"clh": {**clh_section, **change}}}))
    assert said in refused.value.message
    assert refused.value.hint


def test_find_prefers_what_was_asked_and_names_what_it_tried(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.touch()
    assert config.find(str(file)) == str(file)
    with pytest.raises(UsageError, match=r"cannot find usable config file \(/nowhere/c\.toml\)"):
        config.find("/nowhere/c.toml")


@pytest.fixture
def firecracker_section(tmp_path: Path) -> dict[str, object]:
    """A ``[hypervisor.firecracker]`` whose files exist."""
    names = {"path": "firecracker", "jailer_path": "jailer", "kernel": "vmlinux", "initrd": "initrd"}
    for name in names.values():
        (tmp_path / name).touch()
    return {key: str(tmp_path / name) for key, name in names.items()}


def test_firecracker_gets_disks_unless_told_otherwise(tmp_path: Path, firecracker_section: dict[str, object]) -> None:
    loaded = config.load(written(tmp_path, {"hypervisor": {"firecracker": firecracker_section}})).hypervisor
    assert isinstance(loaded, config.FirecrackerConfig)
    assert not loaded.disable_block_device_use
    assert loaded.block_device_driver is config.BlockDriver.VIRTIO_MMIO


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"disable_block_device_use": True}, "leaves no way to give a guest its root file system"),
        ({"block_device_driver": "virtio-scsi"}, 'set it to "virtio-mmio" or "virtio-blk"'),
        ({"placeholder_drives": 12}, "together with read_only_placeholder_drives at most 15"),
        ({"placeholder_drives": -1}, "neither kind of placeholder can be fewer than none"),
        ({"jailer_path": "/no/such/jailer"}, "leave the path empty to run without one"),
    ],
)
def test_what_firecracker_cannot_do_is_refused_before_anything_is_started(
    tmp_path: Path, firecracker_section: dict[str, object], changes: dict[str, object], said: str
) -> None:
    path = written(tmp_path, {"hypervisor": {"firecracker": {**firecracker_section, **changes}}})
    with pytest.raises(UsageError) as failure:
        config.load(path)
    assert said in str(failure.value)


def test_without_a_jailer_firecracker_may_have_any_files(
    tmp_path: Path, firecracker_section: dict[str, object]
) -> None:
    section = {**firecracker_section, "jailer_path": ""}
    assert config.load(written(tmp_path, {"hypervisor": {"firecracker": section}})).hypervisor.name == "firecracker"
