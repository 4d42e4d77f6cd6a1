"""The connection between a launch and what minds each of its workers: one JSON object per line, both ways."""

import json
import selectors
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

LONGEST_BYTES = 1 << 20
SCHEME = "tcp://"
# As the number of a worker's output, beside those of stdout and stderr: it is shown already.
LOG_ALONE = 0
# A peer that is cut off, or whose host died, is given up after 30 s.
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 30_000}


class Rendezvous(NamedTuple):
    """Where a launch listens, and the word by which it knows its own workers."""

    address: str
    port: int
    word: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.word}@{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Rendezvous":
        word, _, place = text.removeprefix(SCHEME).partition("@")
        address, _, port = place.rpartition(":")
        return cls(address, int(port), word)


class MessageSocket:
    """A connected socket that gives and takes whole messages."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; False where nobody is there to take it."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, once the socket is readable; None at the end of the connection, and after nonsense."""
        try:
            part = self.connection.recv(1 << 16)
        except OSError:
            return None
        self._received += part
        *lines, self._received = self._received.split(b"\n")
        if not part or len(self._received) > LONGEST_BYTES:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(one, dict) for one in messages) else None

    def close(self) -> None:
        self.connection.close()


def ready(sources: Sequence[Any], seconds: float) -> list[Any]:
    """Those that can be read, as soon as there is one, or after this time; select(2) knows no more than 1,024 files."""
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, seconds))]


def is_own(address: str) -> bool:
    """Whether this host has the IP address: then it is the one by which it would send there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # only asks the routing table
        except OSError:
            return False
        return bool(probe.getsockname()[0] == address)
