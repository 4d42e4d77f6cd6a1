"""The connection between a launch and the agent of each worker: one JSON object per line, in both directions.

An agent sends, in this order, a greeting (token, rank, size, host, agent_pid), then any number of output (stream,
text), terminal and report messages, and at the end one with wait_status, state and time. The launch sends signals.
What arrives is checked field by field before anything of it is used: `Greeting.parse` and `check_record`.
"""

import json
import os
import re
import secrets
import selectors
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from dist_moe.errors import UserError
from dist_moe.untrusted import printable
from dist_moe.worker.contract import LAUNCH_VARIABLE, WorkerState
from dist_moe.worker.network import is_loopback

MAX_MESSAGE_BYTES = 1 << 20
MAX_GREETING_BYTES = 1 << 12
MAX_HOST_CHARACTERS = 255
MAX_WORKERS = 1 << 20
MAX_TIME_S = 1 << 40
RECORDS = {"output", "terminal", "report", "wait_status"}
"""The fields by which records differ; each has exactly one of them."""
RECEIVE_BYTES = 1 << 16
SCHEME = "tcp://"
LOG_ONLY = 0
"""In place of the number of a worker's stream (1 stdout, 2 stderr): the text is on the terminal already."""
# A peer that is cut off, or whose host died, is given up after 30 s. So is one that takes nothing for that time, as a
# launch that is suspended: on this host, where none of the first two can happen, there is no limit.
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
        """Read what `str` writes.

        Raises:
            UserError: It is something else.
        """
        token, _, endpoint = text.removeprefix(SCHEME).partition("@")
        address, _, port = endpoint.rpartition(":")
        if not (
            text.startswith(SCHEME)
            and token
            and address
            and re.fullmatch("[0-9]{1,5}", port)
            and 0 < int(port) < 1 << 16
        ):
            raise UserError(
                f"{LAUNCH_VARIABLE} is set by `dist-moe launch` to {SCHEME}TOKEN@ADDRESS:PORT, and what it holds is "
                "not of this form; unset it, or start the job by `dist-moe launch`"
            )
        return cls(address, int(port), token)


class Greeting(NamedTuple):
    """What an agent says about its worker when it connects.

    Attributes:
        rank: The worker's rank.
        size: The number of workers of its job.
        host: The name of its host, in printable characters.
        agent_pid: The process of the agent; 0 where it names none.
    """

    rank: int
    size: int
    host: str
    agent_pid: int

    @classmethod
    def parse(cls, message: dict[str, Any], token: str) -> "Greeting | None":
        """Read a connection's first message; None where it lacks the token, or any field is not what it has to be."""
        given = str(message.get("token")).encode(errors="replace")
        if not secrets.compare_digest(given, token.encode()):
            return None
        rank, size = message.get("rank"), message.get("size")
        host, pid = message.get("host"), message.get("agent_pid", 0)
        if not (is_count(rank) and is_count(size) and is_count(pid) and rank < size <= MAX_WORKERS):
            return None
        if not (isinstance(host, str) and 0 < len(host) <= MAX_HOST_CHARACTERS):
            return None
        return cls(rank, size, printable(host), pid)


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value of a message is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_record(message: dict[str, Any]) -> str:
    """Return what is wrong with a message that follows a greeting, or ""."""
    if len(RECORDS & message.keys()) > 1:
        return "a record of two kinds"
    match message:
        case {"output": int(stream), "text": str()} if stream in (LOG_ONLY, 1, 2):
            return ""
        case {"terminal": str()} | {"report": str()}:
            return ""
        case {"wait_status": int(status)}:
            return _check_end(status, message.get("state"), message.get("time", 0.0))
    return f"a record with the fields {', '.join(map(repr, sorted(message)))[:80] or 'of none'}"


def _check_end(status: int, state: Any, ended_s: Any) -> str:
    try:
        os.waitstatus_to_exitcode(status)
    except (ValueError, OverflowError):
        return "an exit status that no process has"
    if state not in (None, *WorkerState):
        return "an unknown state"
    # A comparison never raises: math.isfinite and float do for an integer beyond the largest float.
    is_time = isinstance(ended_s, (int, float)) and 0 <= ended_s <= MAX_TIME_S
    return "" if is_time else "a time that is none"


class MessageSocket:
    """Sends and receives whole messages over a connected TCP socket.

    Args:
        connection: The socket. On one that does not block, `send` fails where the peer does not read.
        max_bytes: The size of the largest message that is received next; a larger one closes the connection.

    Raises:
        OSError: The peer is gone already.
    """

    def __init__(self, connection: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.connection = connection
        self.max_bytes = max_bytes
        self._received = b""
        if not is_loopback(connection.getpeername()[0]):
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
        except BlockingIOError:
            return []
        except OSError:
            return None
        self._received += part
        *lines, self._received = self._received.split(b"\n")
        longest = max(map(len, (self._received, *lines)))
        if not part or longest > MAX_MESSAGE_BYTES or len([*lines, self._received][0]) > self.max_bytes:
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

    By poll(2): select(2) accepts file descriptors below 1,024 only, and epoll needs a descriptor of its own.
    """
    with selectors.PollSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, timeout_s))]
