"""The first words between containerd and ``start``. Standard library only until there is something to decode.

==============  ====================================  ==========================================
containerd      standard input of ``start``           answer on its standard output
==============  ====================================  ==========================================
1.6 to 2.2      the runtime's options, or nothing     the address as text, which means Task v2
2.3 and later   ``BootstrapParams``, options within   ``BootstrapResult``: Task v3 at the address
==============  ====================================  ==========================================

Both inputs are protobuf and each parses as the other. containerd's rule (v2.3.4 ``pkg/shim``) tells them apart: the
first two fields of ``BootstrapParams`` repeat the id and the namespace of the command line.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from procs.shim.launch import Launch

_MAX_INPUT = 1 << 20


def greet(launch: Launch) -> None:
    """Read standard input, and note in ``launch`` what it says.

    Raises:
        ValueError: it is malformed or too long.
    """
    given = _read_input()
    if given.startswith(_field(1, launch.sandbox_id) + _field(2, launch.namespace)):
        _take_params(launch, given)
    else:
        launch.options = given


def answer(launch: Launch) -> bytes:
    """Return what ``start`` prints."""
    address = f"unix://{launch.socket_path}"
    if not launch.has_params:
        return f"{address}\n".encode()
    from common.protocols.bootstrap import BootstrapResult

    return BootstrapResult(version=3, address=address, protocol="ttrpc").encode()


def _take_params(launch: Launch, given: bytes) -> None:
    from common.protobuf import DecodeError
    from common.protocols.bootstrap import LOG_DEBUG, BootstrapParams

    try:
        params = BootstrapParams.decode(given)
    except DecodeError as err:
        raise ValueError(f"bootstrap parameters on standard input are malformed: {err}") from err
    launch.has_params = True
    launch.is_debug = launch.is_debug or params.log_level <= LOG_DEBUG
    if params.socket_dir:
        launch.socket_path = f"{params.socket_dir}/{launch.socket_path.rpartition('/')[2]}"
    if params.containerd_ttrpc_address:
        os.environ.setdefault("TTRPC_ADDRESS", params.containerd_ttrpc_address)
    for extension in params.extensions:
        if extension.value is not None:
            launch.options = extension.value.encode()


def _field(number: int, text: str) -> bytes:
    """Return a protobuf field that holds a text of fewer than 128 bytes, as ids and namespaces are."""
    data = text.encode()
    return bytes((number << 3 | 2, len(data) & 0x7F)) + data


def _read_input() -> bytes:
    """Read standard input; a terminal or /dev/null has nothing."""
    if stat.S_ISCHR(os.fstat(0).st_mode):
        return b""
    chunks = []
    size = 0
    while chunk := os.read(0, 65536):
        size += len(chunk)
        if size > _MAX_INPUT:
            raise ValueError(f"standard input of start exceeds {_MAX_INPUT} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
