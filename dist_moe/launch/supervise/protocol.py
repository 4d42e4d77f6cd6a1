"""The connection between a launch and the agent of each worker: one JSON object per line, in both directions.

An agent sends, in this order, a greeting (token, rank, size, host, agent_pid), then any number of output (stream,
text), terminal and report messages, and at the end one with wait_status, state and time. The launch sends signals.
"""

import json
import selectors
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_MESSAGE_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 16
SCHEME = "tcp://"
LOG_ONLY = 0
"""In place of the number of a worker's stream (1 stdout, 2 stderr): the text is on the terminal already."""
# A peer that is cut off, or whose host died, is given up after 30 s.
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 30_000}


class Rendezvous(NamedTuple):
    """Where a launch listens, and the secret by which it recognizes its own workers.

    Attributes:
        address: IPv4 or IPv6 address of the launch's host.
        port: TCP port.
        token: Secret of this launch.
    """

    address: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.token}@{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Rendezvous":
        """Read what `str` writes."""
        token, _, endpoint = text.removeprefix(SCHEME).partition("@")
        address, _, port = endpoint.rpartition(":")
        return cls(address, int(port), token)


class MessageSocket:
    """Sends and receives whole messages over a connected TCP socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        """Return the file descriptor, for `select`."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message, and return whether the connection took it."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that are complete now; call it once the socket is readable.

        Returns:
            The messages, perhaps none; None where the connection is closed or what arrived is not a message.
        """
        try:
            part = self.connection.recv(RECEIVE_BYTES)
        except OSError:
            return None
        self._received += part
        *lines, self._received = self._received.split(b"\n")
        if not part or len(self._received) > MAX_MESSAGE_BYTES:
            return None
        # The peer is untrusted until its token is checked: deep nesting raises RecursionError.
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def wait_readable(sources: Sequence[Any], timeout_s: float) -> list[Any]:
    """Return the sources that can be read, as soon as there is one, or none after the time-out.

    By epoll where the system has it: select(2) accepts file descriptors below 1,024 only.
    """
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, timeout_s))]
