"""Waiting for a guest's agent as a host program would that knows only the channel."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from common.channel import AGENT_VSOCK_PORT, HELLO, HELLO_REPLY, NONCE_SIZE, RESERVED_PORTS
from common.linux import inotify
from common.services.channel import GuestChannel, HybridVsock, KernelVsock, VirtioSerial


async def wait_agent(channel: GuestChannel) -> None:
    """Wait until the guest's agent takes a connection; hotplug needs a guest that listens."""
    match channel:
        case VirtioSerial():
            await _say_hello(channel)
        case HybridVsock():
            if channel.is_late:
                path = Path(channel.socket)
                with inotify.watching(path.parent) as directory:
                    await directory.wait_for(path.name)
            while not await _accepts(channel):
                pass
        case KernelVsock():
            await _connect(channel)


async def _say_hello(channel: VirtioSerial) -> None:
    reader, writer = await asyncio.open_unix_connection(channel.agent_socket)
    nonce = bytes(NONCE_SIZE)
    writer.write(HELLO + nonce)
    assert await reader.readexactly(len(HELLO_REPLY) + NONCE_SIZE) == HELLO_REPLY + nonce
    writer.close()


async def _accepts(channel: HybridVsock) -> bool:
    reader, writer = await asyncio.open_unix_connection(channel.socket)
    writer.write(f"CONNECT {AGENT_VSOCK_PORT}\n".encode())
    answer = await reader.readline()
    writer.close()
    return answer.startswith(b"OK ")


async def _connect(channel: KernelVsock) -> None:
    is_connected = False
    while not is_connected:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.bind((socket.VMADDR_CID_ANY, RESERVED_PORTS[-1]))
            try:
                await asyncio.get_running_loop().sock_connect(sock, (channel.cid, AGENT_VSOCK_PORT))
                is_connected = True
            except (TimeoutError, ConnectionResetError):
                continue
