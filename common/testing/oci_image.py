"""A real OCI image out of Debian's busybox, made here since a registry may be out of reach.

One layer: the static busybox, a link per applet, the few files that programs expect. Same busybox, same bytes.
Source: OCI image specification 1.0, image-layout.md, manifest.md, config.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

REFERENCE = "localhost/busybox:debian"
_BUSYBOX = "/bin/busybox"
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
_DIRECTORIES = ("bin", "etc", "root", "tmp", "proc", "sys", "dev", "run")


def write(target: Path) -> None:
    """Write the image as an OCI layout in a tar file, as ``ctr image import`` reads it."""
    layer = _layer()
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
        }
    )
    described = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    index = _json(
        {
            "schemaVersion": 2,
            "manifests": [{**described, "annotations": {"io.containerd.image.name": REFERENCE}}],
        }
    )
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": index}
    for blob in (layer, config, manifest):
        files[f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"] = blob
    target.write_bytes(_tar(files))


def _layer() -> bytes:
    files, links = busybox_tree()
    return _tar({**files, **_FILES}, directories=_DIRECTORIES, links=links)


def busybox_tree() -> tuple[dict[str, bytes], dict[str, str]]:
    """Return busybox as a file, and a link per applet, by their paths in a root file system."""
    listed = subprocess.run([_BUSYBOX, "--list"], check=True, capture_output=True, text=True)
    applets = [name for name in listed.stdout.split() if name != "busybox"]
    return {"bin/busybox": Path(_BUSYBOX).read_bytes()}, {f"bin/{name}": "busybox" for name in applets}


def _tar(
    files: Mapping[str, bytes], directories: tuple[str, ...] = (), links: Mapping[str, str] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in directories:
            tar.addfile(_entry(name, tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755))
        for name, content in sorted(files.items()):
            entry = _entry(name, tarfile.REGTYPE, 0o755 if name.startswith("bin/") else 0o644)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in sorted((links or {}).items()):
            entry = _entry(name, tarfile.SYMTYPE, 0o777)
            entry.linkname = target
            tar.addfile(entry)
    return buffer.getvalue()


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.mode = mode
    return entry


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}
