"""A Unix socket between processes of one user, over which an engine is called.

Every user of a machine can connect to a port of the loopback. Here the kernel tells each side the other's user, and
both drop a connection to somebody else. The socket's name stands in Linux's abstract namespace: it is no file, so a
process that is killed leaves nothing behind, and neither a folder's permissions nor the length of its path matter.
"""

import http.client
import os
import secrets
import socket
import struct
from typing import Any

PEER_CREDENTIALS = struct.Struct("iII")  # Linux's struct ucred: process, user, group
BACKLOG = 64


class UserSocket(socket.socket):
    """A listening socket that accepts connections of this process's user alone."""

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            connection, address = super().accept()
            if user_of_peer(connection) == os.geteuid():
                return connection, address
            connection.close()


def user_of_peer(connection: socket.socket) -> int:
    """The user id of the process that connected, or of the one that listens."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    _, user, _ = PEER_CREDENTIALS.unpack(credentials)
    return user


def listen() -> tuple[socket.socket, str]:
    """A listening socket, which a child process may inherit, and its name. The child accepts with ``UserSocket``."""
    name = f"engine-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(BACKLOG)
    return listener, name


class UserConnection(http.client.HTTPConnection):
    """HTTP over the socket of this name. Connecting raises PermissionError where another user listens."""

    def __init__(self, name: str, timeout: float | None) -> None:
        """``timeout``: seconds of each wait, None for no limit."""
        super().__init__("localhost", timeout=timeout)
        self.name = name

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            connection.connect(f"\0{self.name}")
            if user_of_peer(connection) != os.geteuid():
                raise PermissionError("another user listens at the engine's socket")
        except BaseException:
            connection.close()
            raise
        self.sock = connection
