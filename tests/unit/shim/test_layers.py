"""What the templates of containerd's mounts stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import UnsupportedError, UsageError
from common.protocols.task import Mount
from procs.shim import layers

if TYPE_CHECKING:
    from procs.shim.layers import Layers

LAYER = Mount(type="erofs", source="/layer.erofs", target="", options=["ro", "loop"])
PLACES = ["/l/0", "/l/1", "/l/2"]


def stack(*options: str, fstype: str = "format/mkdir/overlay", source: str = "overlay") -> Layers:
    top = Mount(type=fstype, source=source, target="", options=list(options))
    found = layers.of([LAYER, LAYER, LAYER, top])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("template", "meant"),
    [
        ("lowerdir={{ mount 1 }}", "lowerdir=/l/1"),
        ("lowerdir={{overlay 0 2}}", "lowerdir=/l/0:/l/1:/l/2"),
        ("lowerdir={{ overlay 2 1 }}", "lowerdir=/l/2:/l/1"),
        ("lowerdir=/a:/b", "lowerdir=/a:/b"),
        ("upperdir={{ mount 0 }}/upper", "upperdir=/l/0/upper"),
    ],
)
def test_a_template(template: str, meant: str) -> None:
    assert stack(template).at(PLACES).top == Mount(type="overlay", source="overlay", target="", options=[meant])


def test_the_source_of_a_bind_mount_and_the_directory_that_it_wants() -> None:
    made = "X-containerd.mkdir.path={{ mount 0 }}/upper:0755"
    found = stack(made, "rbind", fstype="format/mkdir/bind", source="{{ mount 0 }}/upper").at(PLACES)
    assert found.top == Mount(type="bind", source="/l/0/upper", target="", options=["rbind"])
    assert found.directories == ("/l/0/upper",)


def test_mounts_that_are_complete_are_no_layers() -> None:
    assert layers.of([]) is None
    assert layers.of([LAYER]) is None


@pytest.mark.parametrize("template", ["{{ mount 3 }}", "{{ overlay 1 3 }}", "{{ overlay 4 1 }}"])
def test_a_mount_that_there_is_not(template: str) -> None:
    with pytest.raises(UsageError, match="there are 3 mounts before"):
        stack(template).at(PLACES)


@pytest.mark.parametrize("template", ["{{ source 0 }}", "{{ mount }}", "{{ mount -1 }}"])
def test_another_template_is_refused(template: str) -> None:
    with pytest.raises(UnsupportedError, match="is not supported"):
        stack(template).at(PLACES)


@pytest.mark.parametrize(
    ("fstype", "option"),
    [
        ("mkfs/ext4", "rw"),
        ("format/mkfs/overlay", "rw"),
        ("format/overlay", "X-containerd.other=1"),
        ("format/mkdir/overlay", "X-containerd.mkdir.path={{ mount 0 }}/upper"),
        ("format/mkdir/overlay", "X-containerd.mkdir.path={{ mount 0 }}/upper:0700"),
        ("format/mkdir/overlay", "X-containerd.mkdir.path={{ mount 0 }}/upper:0755:1:1"),
    ],
)
def test_what_only_containerds_mount_manager_does_is_refused(fstype: str, option: str) -> None:
    with pytest.raises(UnsupportedError):
        stack(option, fstype=fstype)
