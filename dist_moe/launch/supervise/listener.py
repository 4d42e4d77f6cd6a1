"""Accepts the connections of agents, and bounds what strangers can make a launch hold: number, bytes and seconds."""

import contextlib
import errno
import math
import resource
import socket
import time
from typing import Any

from dist_moe.launch.supervise.protocol import (
    MAX_GREETING_BYTES,
    MAX_MESSAGE_BYTES,
    Greeting,
    MessageSocket,
    wait_readable,
)
from dist_moe.text import counted

Agent = tuple[MessageSocket, Greeting, list[dict[str, Any]]]
"""The connection of an agent, its greeting, and the messages after it."""

BACKLOG = 1024
MAX_STRANGERS = 256
"""Connections without a greeting that are held at a time; where there are more, the oldest silent one is closed."""
GREETING_LIMIT_S = 5.0
"""An agent sends its greeting as soon as it is connected."""
ACCEPTS_PER_ROUND = 64
PAUSE_S = 0.5
"""After `accept` has failed, and no stranger can be closed to free a file descriptor, the next try waits for this."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
FILES_PER_WORKER = 2
FILES_OF_A_LAUNCH = 256


class Listener:
    """The socket of a launch, and the connections that have not proven yet that they belong to it.

    Args:
        address: An address of this host that the workers can reach. Nothing listens on any other.
        token: The secret of the launch.
    """

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=BACKLOG)
        self._server.setblocking(False)
        self._token = token
        # Connection -> when it was accepted, in seconds of the monotonic clock; the oldest first.
        self._strangers: dict[MessageSocket, float] = {}
        self._paused_until_s = 0.0

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._server.getsockname()[1])

    def sources(self) -> list[socket.socket | MessageSocket]:
        """Return what `poll` reads from."""
        accepts = time.monotonic() >= self._paused_until_s
        return [*([self._server] if accepts else []), *self._strangers]

    def poll(self, readable: set[object]) -> list[Agent]:
        """Return the agents that have proven that they belong to the launch, with the messages after their greeting.

        Args:
            readable: The sources that can be read.
        """
        found = self._receive([stranger for stranger in self._strangers if stranger in readable])
        self._expire()
        if self._server in readable:
            found += self._accept()
        return found

    def _receive(self, readable: list[MessageSocket]) -> list[Agent]:
        found = []
        for stranger in readable:
            messages = stranger.receive()
            if messages == []:
                continue  # the first message is not complete yet
            del self._strangers[stranger]
            greeting = Greeting.parse(messages[0], self._token) if messages else None
            if greeting is None:
                stranger.close()
                continue
            stranger.max_bytes = MAX_MESSAGE_BYTES
            found.append((stranger, greeting, (messages or [])[1:]))
        return found

    def close(self) -> None:
        """Stop to listen, and close the connections of strangers."""
        for stranger in self._strangers:
            stranger.close()
        self._strangers.clear()
        self._server.close()

    def _expire(self) -> None:
        now_s = time.monotonic()
        for stranger in [one for one, accepted_s in self._strangers.items() if now_s - accepted_s > GREETING_LIMIT_S]:
            self._close(stranger)

    def _accept(self) -> list[Agent]:
        """Accept connections, with the agents that are found where places are made for them."""
        found: list[Agent] = []
        for _ in range(ACCEPTS_PER_ROUND):
            try:
                connection = self._server.accept()[0]
            except BlockingIOError:
                break
            except OSError as error:
                # Without a free file descriptor or memory, strangers are closed; else the peer is gone again.
                if error.errno in EXHAUSTED and self._strangers:
                    found += self._make_place()
                    continue
                self._paused_until_s = time.monotonic() + PAUSE_S
                break
            connection.setblocking(False)
            try:
                self._strangers[MessageSocket(connection, MAX_GREETING_BYTES)] = time.monotonic()
            except OSError:  # the peer is gone again
                connection.close()
            if len(self._strangers) > MAX_STRANGERS:
                found += self._make_place()
        return found

    def _make_place(self) -> list[Agent]:
        """Close the oldest stranger, unless it has proven by now that it is an agent, which is returned then.

        An agent sends its greeting right after it has connected, so it has arrived before the agent is the oldest.
        """
        oldest = next(iter(self._strangers))
        found = self._receive(wait_readable([oldest], 0))
        if oldest in self._strangers:
            self._close(oldest)
        return found

    def _close(self, stranger: MessageSocket) -> None:
        del self._strangers[stranger]
        stranger.close()


def raise_file_limit(workers: int) -> str:
    """Raise the soft limit of open files to the hard one, and return a warning where that is too few, or ""."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_PER_WORKER * workers + FILES_OF_A_LAUNCH
    limit = min(_files(hard), max(_files(soft), wanted))
    if limit > _files(soft):
        # No further than needed: children inherit it, and some close each descriptor below it one by one.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), hard))
    if limit >= wanted:
        return ""
    needed = f"{counted(workers, 'worker')}, which {'need' if workers > 1 else 'needs'} about {wanted:,}"
    return f"ulimit -n {hard} is few for {needed}; raise the hard limit"


def _files(limit: int) -> float:
    return math.inf if limit in (-1, resource.RLIM_INFINITY) else limit
