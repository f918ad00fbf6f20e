"""The OCI specification, as crun does it in a real guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common import status
from common.protocols import oci
from common.protocols.agent import AGENT_SERVICE, SHARE_MOUNT_POINT, CreateContainerRequest, Empty
from common.testing.agent_client import AgentError
from common.testing.guest_sandbox import GuestSandbox, container_spec, create_sandbox_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.image import Image

    Adjust = Callable[[oci.Spec], object]


def process(spec: oci.Spec) -> oci.Process:
    assert spec.process
    return spec.process


def linux(spec: oci.Spec) -> oci.Linux:
    assert spec.linux
    return spec.linux


def newer(spec: oci.Spec) -> None:
    spec.oci_version = "1.3.0"


def readonly(spec: oci.Spec) -> None:
    assert spec.root
    spec.root.readonly = True


def rlimits(spec: oci.Spec) -> None:
    process(spec).rlimits = [oci.POSIXRlimit(type="RLIMIT_NOFILE", soft=256, hard=512)]


def user(spec: oci.Spec) -> None:
    process(spec).user = oci.User(uid=1000, gid=1001, additional_gids=[5, 6])


def score(spec: oci.Spec) -> None:
    process(spec).oom_score_adj = 500


def privileges(spec: oci.Spec) -> None:
    process(spec).no_new_privileges = False


def unprivileged(spec: oci.Spec) -> None:
    process(spec).capabilities = oci.LinuxCapabilities()


def masked(spec: oci.Spec) -> None:
    linux(spec).masked_paths = ["/proc/uptime", "/sys/kernel"]


def sysctl(spec: oci.Spec) -> None:
    linux(spec).sysctl = {"kernel.shmmax": "12345678", "net.ipv4.ip_default_ttl": "42", "fs.mqueue.msg_max": "20"}


def device(spec: oci.Spec) -> None:
    linux(spec).devices = [oci.LinuxDevice(path="/dev/mine", type="c", major=1, minor=5, file_mode=0o640, gid=7)]


def resources(spec: oci.Spec) -> oci.LinuxResources:
    given = linux(spec).resources = linux(spec).resources or oci.LinuxResources()
    spec.mounts.append(oci.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=["ro"]))
    return given


def device_rules(spec: oci.Spec) -> None:
    nothing = oci.LinuxDeviceCgroup(allow=False, type="a", major=-1, minor=-1, access="rwm")
    readable = oci.LinuxDeviceCgroup(allow=True, type="c", major=1, minor=11, access="r")
    resources(spec).devices = [nothing, readable]
    linux(spec).devices = [
        oci.LinuxDevice(path="/dev/kmsg", type="c", major=1, minor=11),
        oci.LinuxDevice(path="/dev/snapshot", type="c", major=10, minor=237),
    ]


def unified(spec: oci.Spec) -> None:
    resources(spec).unified = {"memory.high": "67108864", "memory.oom.group": "1"}


def huge_pages(spec: oci.Spec) -> None:
    resources(spec).hugepage_limits = [oci.LinuxHugepageLimit(page_size="2MB", limit=4 << 20)]


def tmpfs(spec: oci.Spec) -> None:
    spec.mounts.append(oci.Mount(destination="/mnt/new", type="tmpfs", source="t", options=["size=64k", "noexec"]))


def seccomp(spec: oci.Spec) -> None:
    refused = oci.LinuxSyscall(names=["mkdir", "mkdirat"], action="SCMP_ACT_ERRNO", errno_ret=38)
    large = oci.LinuxSeccompArg(index=1, value=0o777, op="SCMP_CMP_EQ")
    some = oci.LinuxSyscall(names=["chmod"], action="SCMP_ACT_ERRNO", errno_ret=11, args=[large])
    architectures = ["SCMP_ARCH_X86_64"]
    linux(spec).seccomp = oci.LinuxSeccomp(
        default_action="SCMP_ACT_ALLOW", architectures=architectures, syscalls=[refused, some]
    )


_CGROUP = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cat"

CASES: dict[str, tuple[Adjust, str, str]] = {
    "a newer version": (newer, "echo yes", "yes"),
    "a root that is read-only": (readonly, "touch /x 2>&1 || echo refused", "touch: /x: Read-only file system refused"),
    "limits of resources": (rlimits, "ulimit -Sn; ulimit -Hn", "256 512"),
    "a user and groups": (user, "id -u; id -g; id -G", "1000 1001 1001 5 6"),
    "a score": (score, "cat /proc/self/oom_score_adj", "500"),
    "no new privileges": (lambda _: None, "grep NoNewPrivs /proc/self/status", "NoNewPrivs: 1"),
    "new privileges": (privileges, "grep NoNewPrivs /proc/self/status", "NoNewPrivs: 0"),
    "capabilities": (lambda _: None, "grep CapEff /proc/self/status", "CapEff: 00000000000400e3"),
    "no capabilities": (unprivileged, "grep CapBnd /proc/self/status", "CapBnd: 0000000000000000"),
    "masked paths": (masked, "wc -c < /proc/uptime; ls /sys/kernel | wc -l", "0 0"),
    "read-only paths": (
        lambda _: None,
        "echo 1 > /proc/sys/kernel/panic || echo refused",
        "refused",
    ),
    "kernel parameters": (
        sysctl,
        "cd /proc/sys; cat kernel/shmmax net/ipv4/ip_default_ttl fs/mqueue/msg_max",
        "12345678 42 20",
    ),
    "a device": (device, "stat -c '%a %g %t:%T' /dev/mine; head -c 3 /dev/mine | wc -c", "640 7 1:5 3"),
    "device rules": (
        device_rules,
        "cd /dev; head -c 0 kmsg && (: > kmsg) 2>/dev/null || echo 'read only';"
        "(: < snapshot) 2>&1 | grep -o 'Operation not permitted'; : > null; : < zero; tty -s < ptmx; echo usable",
        "read only Operation not permitted usable",
    ),
    "files of the cgroup": (unified, f"{_CGROUP} memory.high memory.oom.group", "67108864 1"),
    "a limit of huge pages": (huge_pages, f"{_CGROUP} hugetlb.2MB.max", "4194304"),
    "the default devices": (
        lambda _: None,
        "cd /dev; for d in null zero full random urandom tty; do [ -c $d ] && printf .; done; ls -d ptmx",
        "......ptmx",
    ),
    "a mount with options": (tmpfs, "grep ' /mnt/new ' /proc/mounts | grep -o 'noexec\\|size=64k'", "noexec size=64k"),
    "seccomp": (
        seccomp,
        "mkdir /tmp/x 2>&1; touch /tmp/y; chmod 777 /tmp/y 2>&1; chmod 755 /tmp/y && echo allowed",
        "mkdir: can't create directory '/tmp/x': Function not implemented "
        "chmod: /tmp/y: Resource temporarily unavailable allowed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_container_is_as_specified(guest: GuestSandbox, case: str) -> None:
    adjust, script, expected = CASES[case]
    task = guest.run("sh", "-c", script, adjust=adjust)
    assert (" ".join(task.stdout.read_all().decode().split()), task.wait()) == (expected, 0)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("net.no.such", "1", r"kernel parameter net.no.such = '1': No such file"),
        ("net.ipv4.ip_default_ttl", "many", r"kernel parameter net.ipv4.ip_default_ttl = 'many': Invalid argument"),
        ("net./etc/x", "1", "is not the name of a kernel parameter"),
        ("net...core.somaxconn", "1", "is not the name of a kernel parameter"),
    ],
)
def test_a_kernel_parameter_that_is_none_is_refused(guest: GuestSandbox, name: str, value: str, said: str) -> None:
    spec = container_spec(f"{SHARE_MOUNT_POINT}/base/rootfs", "true")
    linux(spec).sysctl = {name: value}
    with pytest.raises(AgentError, match=said) as refused:
        guest.agent.ask("CreateContainer", CreateContainerRequest(container_id="wrong", oci=spec), Empty)
    assert refused.value.code == status.INVALID_ARGUMENT


HOOK = """#!/usr/bin/python3.11 -ISE
import posix, sys
file = posix.open("/run/kata-containers/shared/containers/base/rootfs/hooks.log",
                  posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND)
posix.write(file, f"{sys.argv} {b'creat' in posix.read(0, 4096)}\\n".encode())
"""


def test_hooks_of_the_guest_run_for_each_container_and_at_the_end(image: Image) -> None:
    with GuestSandbox(image.vmlinux, image.initrd) as guest:
        for stage in ("prestart", "poststart", "poststop"):
            directory = guest.rootfs / "hooks" / stage
            directory.mkdir(parents=True)
            (directory / "note").write_text(HOOK.replace("posix.write", "posix.write"))
            (directory / "note").chmod(0o755)
            (directory / "README").write_text("not a hook")
        request = create_sandbox_request()
        request.storages = []
        request.guest_hook_path = f"{SHARE_MOUNT_POINT}/base/rootfs/hooks"
        guest.agent.ask("CreateSandbox", request, Empty)
        task = guest.run("sleep", "1000")
        ended = guest.agent.begin(AGENT_SERVICE, "DestroySandbox", Empty())
        assert task.wait() == 137
        guest.agent.finish(ended, Empty)
        lines = (guest.rootfs / "hooks.log").read_text().splitlines()
    assert [line.split("'")[3] for line in lines] == ["prestart", "poststart", "poststop"]
