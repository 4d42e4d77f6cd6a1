"""A link with latency: relays frames between two interfaces, in both directions, with a delay.

`python relay.py INTERFACE INTERFACE SECONDS`, in the network namespace of both; prints `ready` and runs until it is
ended. Uses only the standard library; drops and reorders nothing.
"""

import collections
import contextlib
import os
import select
import socket
import sys
import time

EVERY_PROTOCOL = 0x0003  # ETH_P_ALL
SOL_PACKET, IGNORE_OUTGOING = 263, 23
SNDBUFFORCE, RCVBUFFORCE = 32, 33
LONGEST_FRAME = 65_536
ROOM_BYTES = 16 << 20
"""Buffer for frames that arrive while the relay waits for a core."""
AT_ONCE = 64


def port(interface: str) -> socket.socket:
    """Return a socket that receives every incoming frame of an interface, and no outgoing one."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    raw.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
    for option in (SNDBUFFORCE, RCVBUFFORCE):
        raw.setsockopt(socket.SOL_SOCKET, option, ROOM_BYTES)
    raw.bind((interface, 0))
    return raw


def relay(one: socket.socket, other: socket.socket, delay_s: float) -> None:
    """Relay frames until the process is ended."""
    ways = [(one, other), (other, one)]
    waiting: list[collections.deque[tuple[float, bytes]]] = [collections.deque(), collections.deque()]
    while True:
        now_s = time.monotonic()
        for held, (_, leaves) in zip(waiting, ways, strict=True):
            while held and held[0][0] <= now_s:
                leaves.send(held.popleft()[1])
        next_s = min((held[0][0] for held in waiting if held), default=None)
        limit_s = None if next_s is None else max(0.0, next_s - time.monotonic())
        ready = select.select([one, other], [], [], limit_s)[0]
        due_s = time.monotonic() + delay_s
        for held, (enters, _) in zip(waiting, ways, strict=True):
            if enters in ready:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(AT_ONCE):
                        held.append((due_s, enters.recv(LONGEST_FRAME, socket.MSG_DONTWAIT)))


if __name__ == "__main__":
    os.nice(-10)  # The workers use every core, and a late frame would make the link slower.
    ends = port(sys.argv[1]), port(sys.argv[2])
    print("ready", flush=True)
    relay(ends[0], ends[1], float(sys.argv[3]))
