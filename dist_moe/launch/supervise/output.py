"""What a launch prints and logs of its workers' output: bounded, and without waiting until it is read."""

import contextlib
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

from dist_moe.files import open_no_link
from dist_moe.launch.supervise.pty import CLEAR_LINE, CONTROL, SHOW_CURSOR, TerminalFilter
from dist_moe.text import counted, plain_text
from dist_moe.worker.contract import log_file

T = TypeVar("T")

LOG_BYTES = 64 << 20
"""A log that grows beyond this is renamed to rank-N.log.1, in place of an earlier one, and a new log is started."""
BUFFER_BYTES = 4 << 20
"""The largest buffer for a stream that is not read; further text is dropped, and counted."""
PATIENCE_S = 0.2
"""A stream that takes nothing for this time is no longer waited for."""
LAST_WORDS_S = 0.5
"""At the end, what waits for a stream has this long."""


class StreamWriter:
    """Writes to a stream of this process from a thread of its own.

    `write` returns once the stream has taken the text, as long as the stream is read. Otherwise it returns at once:
    the text waits in a buffer, and what does not fit there is dropped and counted.

    Args:
        name: stdout or stderr; the stream is looked up at each write, since tests replace it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.Queue[tuple[TextIO, str]] = queue.Queue()
        self._waiting = 0
        self._dropped = 0
        self._stuck = False
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def stream(self) -> TextIO:
        """The stream."""
        stream: TextIO = getattr(sys, self._name)
        return stream

    def write(self, text: str) -> None:
        """Write a text, or drop it where the buffer is full."""
        if not text:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"write-{self._name}", daemon=True)
            self._thread.start()
        with self._lock:
            if self._waiting > BUFFER_BYTES:
                self._dropped += text.count("\n")
                return
            self._put(text)
            self._wait(0.0 if self._stuck else PATIENCE_S)

    def finish(self, limit_s: float = LAST_WORDS_S) -> None:
        """Wait until everything is written, with the number of lines that were dropped, or the time is over."""
        with self._lock:
            if self._dropped:
                self._put("")
            self._wait(limit_s)

    def _put(self, text: str) -> None:
        """Hand a text to the thread, after a note where lines were dropped before it."""
        if self._dropped:
            what = f"{counted(self._dropped, 'line')} {'is' if self._dropped == 1 else 'are'} not shown"
            text = f"[{what}: nothing read the output in time; see logs/ in run.dir]\n{text}"
            self._dropped = 0
        self._waiting += len(text)
        self._queue.put((self.stream, text))

    def _wait(self, limit_s: float) -> None:
        self._stuck = not self._lock.wait_for(lambda: self._waiting == 0, limit_s)

    def _work(self) -> None:
        while True:
            stream, text = self._queue.get()
            with contextlib.suppress(OSError, ValueError):  # a closed terminal must not end the job
                _write_through(stream, text)
            with self._lock:
                self._waiting -= len(text)
                self._lock.notify_all()


def _write_through(stream: TextIO, text: str) -> None:
    """Write past the buffer of a stream: at its exit, Python would wait for one that another thread holds."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        stream.write(text)
        stream.flush()
        return
    _until_taken(descriptor, stream.flush)
    content = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
    while content:
        content = content[_until_taken(descriptor, partial(os.write, descriptor, content)) :]


def _until_taken(descriptor: int, write: Callable[[], T]) -> T:
    """Call `write`, again and again as long as the stream does not block and takes nothing."""
    while True:
        try:
            return write()
        except BlockingIOError:
            # Another program that has the same pipe or terminal open may have made it so.
            waiting = select.poll()
            waiting.register(descriptor, select.POLLOUT)
            waiting.poll()


class JobOutput:
    """Prints the output of all workers, and keeps it in a log per rank.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._writers = {1: StreamWriter("stdout"), 2: StreamWriter("stderr")}
        self._filter = TerminalFilter()
        self._line_is_live = False

    def lines(self, stream: int, prefix: str, text: str) -> None:
        """Print a worker's lines, each with its prefix; `stream` is 1 for stdout and 2 for stderr."""
        writer = self._writers[stream]
        clear = CLEAR_LINE if self._line_is_live and writer.stream.isatty() else ""
        writer.write(clear + "".join(f"{prefix}{line}\n" for line in plain_text(text).split("\n")))
        self._line_is_live = False

    def terminal(self, text: str) -> None:
        """Write rank 0's terminal output as it is, without escapes that a terminal must not get from a worker.

        Its last line may be a live one.
        """
        text = self._filter.feed(text)
        visible = CONTROL.sub(b"", text.encode(errors="replace"))
        self._line_is_live = not visible.endswith(b"\n") if visible else self._line_is_live
        self._writers[1].write(text)

    def announce(self, text: str) -> None:
        """Write a line of the launch itself to stderr."""
        self.lines(2, "", text)

    def log(self, rank: int, text: str) -> None:
        """Append to the rank's log, which exists from the worker's start; a full disk must not end the job."""
        with contextlib.suppress(OSError):
            path = log_file(self._run_dir, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="replace", opener=open_no_link) as log:
                log.write(plain_text(text))
                size = log.tell()
            if size > LOG_BYTES:
                older = path.with_name(f"{path.name}.1")
                path.replace(older)
                note = (
                    f"[continues {older.name}; a log has at most {LOG_BYTES >> 20} MiB, and older lines are removed]\n"
                )
                with open(path, "x", encoding="utf-8") as log:
                    log.write(note)

    def close(self, limit_s: float = LAST_WORDS_S) -> None:
        """Restore the terminal, and wait a moment, at most `limit_s`, for what is not written yet."""
        if self._line_is_live:
            self._writers[1].write(f"{SHOW_CURSOR}\n")
            self._line_is_live = False
        for writer in self._writers.values():
            writer.finish(max(0.0, min(limit_s, LAST_WORDS_S)))


def print_within(stream_name: str, text: str, limit_s: float = LAST_WORDS_S) -> None:
    """Print a text to stdout or stderr, and wait at most `limit_s` until it is read."""
    writer = StreamWriter(stream_name)
    writer.write(text)
    writer.finish(limit_s)
