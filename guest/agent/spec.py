"""What crun is told of a container, made of what the host says."""

from __future__ import annotations

from common import status
from common.protocols.oci import Linux, LinuxNamespace
from guest.agent.files import write_text
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from common.protobuf import Message
    from common.protocols import oci

_OCI_VERSION = "1.0.2"
"""The protocol carries nothing newer, whatever the host's says, and crun refuses versions that it does not know."""
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def complete(spec: oci.Spec, container_id: str, hook_path: str) -> oci.Spec:
    """Return the specification as crun gets it: the cgroup and the hooks are the guest's, the processes its own.

    Raises:
        RpcError: a kernel parameter cannot be set.
    """
    spec.oci_version = _OCI_VERSION
    spec.hooks = None
    if hook_path:
        from guest.agent.hooks import find

        spec.hooks = find(hook_path)
    linux = spec.linux = spec.linux or Linux()
    linux.sysctl = {name: value for name, value in linux.sysctl.items() if not _is_set_here(name, value)}
    linux.cgroups_path = f"/{container_id}"
    if not any(namespace.type == "pid" for namespace in linux.namespaces):
        linux.namespaces.append(LinuxNamespace(type="pid"))
    return spec


def merge(target: Message, source: Message) -> None:
    """Put what ``source`` mentions over what ``target`` says."""
    for field in source.fields():
        value, present = getattr(source, field.name), getattr(target, field.name)
        if field.kind == "message" and value is not None and present is not None and not field.repeated:
            merge(present, value)
        elif value:
            setattr(target, field.name, value)


def _is_set_here(name: str, value: str) -> bool:
    """Set a network parameter: the container has the guest's network, where crun would not set it.

    Raises:
        RpcError: the kernel has none of that name, or not that value.
    """
    if not name.startswith("net."):
        return False
    parts = name.split(".")
    if not all(part and _NAME_CHARACTERS.issuperset(part) for part in parts):
        raise RpcError(status.INVALID_ARGUMENT, f"{name!r} is not the name of a kernel parameter")
    try:
        write_text(f"/proc/sys/{'/'.join(parts)}", value)
    except OSError as err:
        raise RpcError(status.INVALID_ARGUMENT, f"kernel parameter {name} = {value!r}: {err.strerror}") from err
    return True
