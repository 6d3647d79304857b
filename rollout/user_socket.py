"""A Unix socket between processes of one user, on which an engine is called.

Any user of a machine can connect to a loopback port. With a Unix socket, each side can ask the kernel for the user of
the other side, and both close a connection to another user. The socket's name is in Linux's abstract namespace and not
a file. So a process that is killed leaves no file, and neither the permissions of a folder nor the length of a path
matter.
"""

import http.client
import os
import secrets
import socket
import struct
from typing import Any

# Linux's struct ucred: process, user, group.
PEER_CREDENTIALS = struct.Struct("iII")
BACKLOG = 64


class UserSocket(socket.socket):
    """A listening socket that accepts only connections of this process's user."""

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            connection, address = super().accept()
            if user_of_peer(connection) == os.geteuid():
                return connection, address
            connection.close()


def user_of_peer(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of the connection."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    _, user, _ = PEER_CREDENTIALS.unpack(credentials)
    return user


def listen() -> tuple[socket.socket, str]:
    """Return a listening socket and its name. A child process may inherit it and must accept with ``UserSocket``."""
    name = f"engine-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(BACKLOG)
    return listener, name


class UserConnection(http.client.HTTPConnection):
    """An HTTP connection over the socket of this name. Connecting raises PermissionError if another user listens."""

    def __init__(self, name: str, timeout: float | None) -> None:
        """``timeout`` is the limit of each wait in seconds, None for no limit."""
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
