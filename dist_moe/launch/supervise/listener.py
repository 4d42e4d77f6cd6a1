"""Accepts the connections of agents, and bounds what strangers can make a launch hold: number, bytes and seconds."""

import resource
import socket
import time

from dist_moe.launch.supervise.protocol import MAX_GREETING_BYTES, MAX_MESSAGE_BYTES, Greeting, MessageSocket

BACKLOG = 1024
MAX_STRANGERS = 256
"""Connections without a greeting that are held at a time."""
GREETING_LIMIT_S = 5.0
"""An agent sends its greeting as soon as it is connected."""
EVICTION_AGE_S = 1.0
"""Where there are too many strangers, or no file descriptor is free, they are closed at this age."""
ACCEPTS_PER_ROUND = 64
PAUSE_S = 0.5
"""After `accept` has failed, as it does without a free file descriptor, the next try waits for this time."""
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
        accepts = len(self._strangers) < MAX_STRANGERS and time.monotonic() >= self._paused_until_s
        return [*([self._server] if accepts else []), *self._strangers]

    def poll(self, readable: set[object]) -> list[tuple[MessageSocket, Greeting, list[dict[str, object]]]]:
        """Return the agents that have proven that they belong to the launch, with the messages after their greeting.

        Args:
            readable: The sources that can be read.
        """
        found = []
        for stranger in [stranger for stranger in self._strangers if stranger in readable]:
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
        self._expire()
        if self._server in readable:
            self._accept()
        return found

    def close(self) -> None:
        """Stop to listen, and close the connections of strangers."""
        for stranger in self._strangers:
            stranger.close()
        self._strangers.clear()
        self._server.close()

    def _expire(self) -> None:
        now_s = time.monotonic()
        full = len(self._strangers) >= MAX_STRANGERS or now_s < self._paused_until_s
        limit_s = EVICTION_AGE_S if full else GREETING_LIMIT_S
        for stranger in [one for one, accepted_s in self._strangers.items() if now_s - accepted_s > limit_s]:
            del self._strangers[stranger]
            stranger.close()

    def _accept(self) -> None:
        for _ in range(min(ACCEPTS_PER_ROUND, MAX_STRANGERS - len(self._strangers))):
            try:
                connection = self._server.accept()[0]
            except BlockingIOError:
                return
            except OSError:
                # No file descriptor or memory is free, or the peer is gone again.
                self._paused_until_s = time.monotonic() + PAUSE_S
                return
            connection.setblocking(False)
            try:
                self._strangers[MessageSocket(connection, MAX_GREETING_BYTES)] = time.monotonic()
            except OSError:  # the peer is gone again
                connection.close()


def raise_file_limit(workers: int) -> str:
    """Raise the soft limit of open files to the hard one, and return a warning where that is too few, or ""."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = FILES_PER_WORKER * workers + FILES_OF_A_LAUNCH
    if hard in (-1, resource.RLIM_INFINITY) or hard >= wanted:
        return ""
    return f"ulimit -n {hard} is few for {workers} workers, which need about {wanted}; raise the hard limit"
