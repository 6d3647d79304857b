"""The difference between two nodes' clocks, over a TCP connection; also whether a node reaches the first one.

As NTP (RFC 5905): the offset is the other clock's time minus the middle of the question's and the answer's time here.
Of several questions the one with the shortest way counts.
"""

import socket
import struct
import time

QUESTIONS = 5
FORMAT = struct.Struct("!d")
RETRY_SECONDS = 0.2


def serve(listener: socket.socket, count: int, timeout: float) -> int:
    """Answer ``count`` nodes with this node's time; returns how many have asked within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    for asked in range(count):
        listener.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except (TimeoutError, BlockingIOError):
            return asked
        with connection:
            connection.settimeout(RETRY_SECONDS * 25)
            while connection.recv(1):
                connection.sendall(FORMAT.pack(time.time()))
    return count


def offset(host: str, port: int, timeout: float) -> float:
    """Seconds that this node's clock is ahead of that of ``host``, where :func:`serve` answers.

    Raises OSError where it does not answer within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError:
            # The first node may start later.
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
    best = (float("inf"), 0.0)
    with connection:
        for _ in range(QUESTIONS):
            asked = time.time()
            connection.sendall(b"?")
            (answer,) = FORMAT.unpack(connection.recv(FORMAT.size, socket.MSG_WAITALL))
            answered = time.time()
            best = min(best, (answered - asked, (asked + answered) / 2 - answer))
    return best[1]
