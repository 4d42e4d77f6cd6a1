"""A pool of long-lived worker processes that runs a test's function on the ranks of a fresh gloo group."""

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.dist.loaded import start_loaded

LOOPBACK = "127.0.0.1"
START_LIMIT_S = 180.0
"""How long a worker may take to start and import torch, on a machine that is busy with other things."""
GRACE_S = 10.0
"""How long the other ranks may go on once one has failed, before they are ended."""
DUMP_LIMIT_S = 5.0
"""How long to wait for a hanging worker to write its stack."""


class RankError(AssertionError):
    """One or more ranks raised, died or did not answer.

    `rank` is the first rank that failed, `failures` maps each rank that failed to its report: a traceback, an
    exit code, or the stack it was hanging in. `hung` are the ranks that did not answer in time.
    """

    def __init__(self, headline: str, rank: int, failures: dict[int, str], hung: list[int]) -> None:
        reports = "\n".join(f"--- rank {rank} ---\n{report}" for rank, report in failures.items())
        super().__init__(f"{headline}\n{reports}")
        self.rank = rank
        self.failures = failures
        self.hung = hung


@dataclass(frozen=True)
class Task:
    """One call for one worker; `function` is called as `function(rank, world_size, *args)`."""

    function: Callable[..., Any]
    rank: int
    world_size: int
    port: int
    args: tuple[Any, ...]
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What became of a task: its result, or a report of its failure and when that was (monotonic clock)."""

    result: Any = None
    failure: str | None = None
    failed_at_s: float = 0.0


@dataclass(frozen=True)
class Worker:
    """A live worker process, our end of its pipe, and the file in which it writes its stacks when asked."""

    process: ForkServerProcess
    connection: Connection
    stack_file: Path

    def stack(self) -> str:
        """The stacks of the worker's threads at this moment, as text."""
        if self.process.pid is None or not self.process.is_alive():
            return f"ended with exit code {self.process.exitcode}"
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline_s = time.monotonic() + DUMP_LIMIT_S
        while time.monotonic() < deadline_s:
            text = self.stack_file.read_text()
            # The outermost frame of the main thread, which faulthandler writes last.
            if 'File "<string>", line 1 in <module>' in text:
                return f"did not answer; it was at\n{text}"
            time.sleep(0.02)
        return f"did not answer, and wrote no whole stack within {DUMP_LIMIT_S} s\n{self.stack_file.read_text()}"

    def end(self) -> None:
        """Kill the process, by its own id, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class RankPool:
    """Runs functions on up to `size` ranks, each a process with one torch thread that outlives calls.

    A worker starts at its first use. After a hang or a death the workers are killed, and the next call starts
    new ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="dist-moe-pool-")
        self._workers: list[Worker] = []
        self._started = 0

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the live workers, in the order of their ranks."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def close(self) -> None:
        """End every worker and wait for it."""
        self._end_workers()
        self._folder.cleanup()

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
        """Call `function(rank, world_size, *args)` on ranks 0 .. world_size-1 inside a new gloo group.

        `function` must be importable (defined at the top of a module); it, `args` and the results travel by
        pickle. RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as by a
        launcher. Returns the results in the order of the ranks. Raises RankError if a rank raises, dies, or
        does not answer within `timeout_s` seconds.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size} does not fit this pool; use 1 to {self.size}")
        try:
            self._start_workers(world_size)
            rendezvous = _meeting_point(timeout_s)
            for rank, worker in enumerate(self._workers[:world_size]):
                task = Task(function, rank, world_size, rendezvous.port, args, timeout_s)
                worker.connection.send_bytes(pickle.dumps(task))
            answers = self._collect(world_size, timeout_s)
            return self._results(answers, world_size, timeout_s)
        except RankError:
            raise
        except BaseException:
            # Interrupted or over the test's own limit: workers may be in the middle of anything.
            self._end_workers()
            raise

    def _start_workers(self, count: int) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self._end_workers()
        for _ in range(count - len(self._workers)):
            ours, theirs = multiprocessing.Pipe()
            stack_file = Path(self._folder.name) / f"worker-{self._started}.stack"
            stack_file.touch()
            process = start_loaded(_serve, theirs, str(stack_file))
            theirs.close()
            self._started += 1
            self._workers.append(Worker(process, ours, stack_file))
        for rank, worker in enumerate(self._workers[:count]):
            worker.connection.send_bytes(b"")
            if not worker.connection.poll(START_LIMIT_S):
                raise TimeoutError(f"the worker for rank {rank} did not start within {START_LIMIT_S} s")
            worker.connection.recv_bytes()

    def _collect(self, world_size: int, timeout_s: float) -> dict[int, Answer]:
        """Wait for the answers, after a failure only GRACE_S longer."""
        connection2rank = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        answers: dict[int, Answer] = {}
        deadline_s = time.monotonic() + timeout_s
        while connection2rank:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            for connection in multiprocessing.connection.wait(list(connection2rank), left_s):
                assert isinstance(connection, Connection)
                rank = connection2rank.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank].process
                    process.join(DUMP_LIMIT_S)
                    # It cannot say when it failed; what the others report is most likely because of it.
                    answers[rank] = Answer(failure=f"the process ended with exit code {process.exitcode}")
                if answers[rank].failure is not None:
                    deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        return answers

    def _results(self, answers: dict[int, Answer], world_size: int, timeout_s: float) -> list[Any]:
        # The first to raise, not the first to be heard: once it leaves its group, the others fail too.
        failed = sorted(answers, key=lambda rank: answers[rank].failed_at_s)
        failures = {rank: report for rank in failed if (report := answers[rank].failure) is not None}
        hung = [rank for rank in range(world_size) if rank not in answers]
        if not failures and not hung:
            return [answers[rank].result for rank in range(world_size)]
        first = next(iter(failures), hung[0] if hung else 0)
        headline = f"rank {first} failed"
        if hung:
            stacks = {rank: self._workers[rank].stack() for rank in hung}
            failures |= stacks
            names = ", ".join(map(str, hung))
            headline = f"{headline}; no answer from rank {names} within {GRACE_S} s of it"
            if first in hung:
                headline = f"no answer from rank {names} within {timeout_s} s"
        if hung or any(not worker.process.is_alive() for worker in self._workers):
            self._end_workers()
        raise RankError(headline, first, failures, hung)

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []


def _meeting_point(timeout_s: float) -> Any:
    """The TCPStore by which the ranks of a task find each other, for as long as it is held.

    Not on rank 0, as of a launcher: others may still need it when that is through. Its port is never free in between.
    """
    from torch.distributed import TCPStore

    return TCPStore(LOOPBACK, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _serve(connection: Connection, stack_file: str) -> None:
    """A worker's life: answer tasks until the pool closes the pipe. An empty message asks if it is ready."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_answer(message) if message else b"")


def _answer(message: bytes) -> bytes:
    """Run one pickled Task; gives a pickled Answer."""
    try:
        task: Task = pickle.loads(message)
        with _process_group(task):
            try:
                answer = Answer(task.function(task.rank, task.world_size, *task.args))
            except Exception:
                answer = Answer(failure=traceback.format_exc(), failed_at_s=time.monotonic())
        return pickle.dumps(answer)
    except Exception:
        return pickle.dumps(Answer(failure=traceback.format_exc(), failed_at_s=time.monotonic()))


@contextlib.contextmanager
def _process_group(task: Task) -> Iterator[None]:
    """A gloo group over the task's ranks, and the launcher's variables; afterwards all is as before."""
    import torch
    import torch.distributed

    environment, folder, timeout = dict(os.environ), os.getcwd(), timedelta(seconds=task.timeout_s)
    linear = torch.nn.functional.linear
    os.environ.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.world_size),
        LOCAL_RANK=str(task.rank),
        LOCAL_WORLD_SIZE=str(task.world_size),
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(task.port),
    )
    try:
        store = torch.distributed.TCPStore(LOOPBACK, task.port, timeout=timeout)
        torch.distributed.init_process_group("gloo", None, timeout, task.world_size, task.rank, store)
        # Without a first meeting, a rank with nothing to do would leave while another is still connecting to it.
        torch.distributed.all_reduce(torch.zeros(1))
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _forget_deepspeed_groups()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        # ZeRO 3 of DeepSpeed replaces it for good. Its gradients come in another order, by which ZeRO 2 sums them: with
        # ranks that differ in it, each gets the gradients of other parameters.
        torch.nn.functional.linear = linear
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
        gc.collect()


def _forget_deepspeed_groups() -> None:
    """DeepSpeed keeps process groups in module globals, and would use the last task's, now destroyed."""
    if "deepspeed" in sys.modules:
        importlib.reload(sys.modules["deepspeed.utils.groups"])
        sys.modules["deepspeed.comm.comm"].__dict__["cdb"] = None
