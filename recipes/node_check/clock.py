"""Measure the difference between two nodes' clocks over a TCP connection.

The measurement also shows whether a node reaches the first node. It works like NTP (RFC 5905): it compares the other
clock's time with the middle between the times at which this node asked and received the answer. Of several questions,
the one with the shortest round trip counts.
"""

import contextlib
import socket
import struct
import threading
import time

QUESTIONS = 5
QUESTION = b"safework: what time is it?"
FORMAT = struct.Struct("!d")
RETRY_SECONDS = 0.2
# Longest wait for a node's next question. A node sends its next question at once.
QUESTION_SECONDS = 5.0


def serve(listener: socket.socket, count: int, timeout: float) -> int:
    """Answer nodes with this node's time until ``count`` of them have asked all their questions.

    Returns the number of nodes that have done so within ``timeout`` seconds. Other programs that connect (a port
    scanner, a monitor) are not counted, and no node waits for them.
    """
    deadline = time.monotonic() + timeout
    answered: list[socket.socket] = []

    def answer(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as questions, contextlib.suppress(OSError):
            connection.settimeout(QUESTION_SECONDS)
            for _ in range(QUESTIONS):
                if questions.read(len(QUESTION)) != QUESTION:
                    return
                connection.sendall(FORMAT.pack(time.time()))
            answered.append(connection)

    listener.settimeout(RETRY_SECONDS)
    while len(answered) < count and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=[connection], daemon=True).start()
    return len(answered)


def offset(host: str, port: int, timeout: float) -> float:
    """Seconds that this node's clock is ahead of the clock of ``host``, where :func:`serve` answers.

    Raises OSError if it does not answer within ``timeout`` seconds.
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
            connection.sendall(QUESTION)
            (answer,) = FORMAT.unpack(connection.recv(FORMAT.size, socket.MSG_WAITALL))
            answered = time.time()
            best = min(best, (answered - asked, (asked + answered) / 2 - answer))
    return best[1]
