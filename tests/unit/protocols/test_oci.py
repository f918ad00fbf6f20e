"""OCI specifications between JSON and messages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.protobuf import Message
from common.protocols.oci import LinuxMemory, Process, Spec, from_json, to_json

CONFIG = {
    "ociVersion": "1.0.2",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 100, "additionalGids": [4, 5], "username": "x"},
        "args": ["sh", "-c", "true"],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": [], "ambient": []},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 0}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
        "apparmorProfile": "p",
        "selinuxLabel": "l",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
    "hooks": {
        stage: [{"path": "/bin/hook", "args": ["hook", stage], "env": ["A=1"], "timeout": 5}]
        for stage in ("prestart", "poststart", "poststop", "createRuntime", "createContainer", "startContainer")
    },
    "annotations": {"io.example/a": "1"},
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "sysctl": {"net.core.somaxconn": "256"},
        "resources": {
            "memory": {"limit": -1, "kernelTCP": 5, "disableOOMKiller": True},
            "cpu": {"shares": 2, "cpus": "0", "realtimeRuntime": 7},
            "pids": {"limit": 100},
            "devices": [{"allow": False, "type": "c", "major": 5, "minor": 0, "access": "rwm"}],
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
            "blockIO": {
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 2}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 3}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 4}],
            },
            "unified": {"memory.high": "max"},
        },
        "cgroupsPath": "/x",
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/p"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 38,
                    "args": [{"index": 0, "value": 0, "valueTwo": 7, "op": "SCMP_CMP_MASKED_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "private",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "m",
    },
}
"""Every key that is declared, with a value that is kept."""


def without_empty(plain: object) -> object:
    """Drop empty lists, which JSON has and messages do not."""
    if isinstance(plain, dict):
        return {key: without_empty(value) for key, value in plain.items() if value != []}
    return [without_empty(item) for item in plain] if isinstance(plain, list) else plain


def test_config_json_survives_the_way_through_the_agent_protocol() -> None:
    spec = Spec.decode(from_json(Spec, CONFIG).encode())
    assert json.loads(json.dumps(to_json(spec))) == without_empty(CONFIG)


def test_every_declared_field_is_in_the_example() -> None:
    """So that a wrong JSON name cannot hide."""
    spec = from_json(Spec, CONFIG)

    def unset(message: Message) -> list[str]:
        names = []
        for field in message.fields():
            value = getattr(message, field.name)
            inner = value if isinstance(value, list) else [value]
            names += [name for item in inner if isinstance(item, Message) for name in unset(item)]
            if not value and not isinstance(value, int):
                names.append(field.name)
        return names

    assert set(unset(spec)) == {"inheritable", "permitted", "ambient", "gid_mappings", "path", "mems"}


def test_absent_numbers_stay_absent_and_required_ones_are_there() -> None:
    assert to_json(LinuxMemory(limit=5)) == {"limit": 5}
    assert to_json(Process(args=["x"])) == {"terminal": False, "args": ["x"], "cwd": ""}
    plain = to_json(from_json(Process, {"user": {}, "cwd": ""}))
    assert plain == {"terminal": False, "user": {"uid": 0, "gid": 0}, "cwd": ""}


def test_what_is_not_declared_does_not_enter_the_guest() -> None:
    spec = from_json(Spec, {"ociVersion": "1.0.2", "vm": {}, "linux": {"intelRdt": {"x": 1}}})
    assert to_json(spec) == {"ociVersion": "1.0.2", "linux": {}}


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ([], r"\$ is \[\]; it must be of type dict"),
        ({"process": {"args": "sh"}}, r"\$\.process\.args is 'sh'; it must be of type list"),
        ({"process": {"args": ["sh", 1]}}, r"\$\.process\.args\[1\] is 1; it must be of type str"),
        ({"process": {"user": {"uid": True}}}, r"\$\.process\.user\.uid is True; it must be of type int"),
        ({"annotations": {"a": 1}}, r"\$\.annotations\.a is 1; it must be of type str"),
        ({"mounts": [{"options": {}}]}, r"\$\.mounts\[0\]\.options is \{\}; it must be of type list"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(obj: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_json(Spec, obj)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*CONFIG, "args", "user", "uid", "memory", "limit"]), inner, max_size=3)
    ),
)


@given(json_values)
def test_any_json_is_a_specification_or_a_value_error(obj: object) -> None:
    try:
        spec = from_json(Spec, obj)
    except ValueError:
        return
    assert from_json(Spec, to_json(spec)) == spec
