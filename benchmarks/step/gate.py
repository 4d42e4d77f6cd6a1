"""The worker's side of a measurement: where a training loop waits for its next turn, and what it reports.

A worker connects to the benchmark by a Unix socket and calls `Gate.pass_step` at the end of each training step. There
it waits until the benchmark asks for more steps. Messages are lines of JSON. The time of a step is that between two
calls, so that it includes everything that the training loop does.
"""

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

SOCKET_VARIABLE, CORES_VARIABLE = "BENCHMARK_SOCKET", "BENCHMARK_CORES"
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "RANK")
# Collective of torch.distributed -> the position of the tensor that a rank gives to it.
COLLECTIVES = {
    "all_to_all_single": 1,
    "all_reduce": 0,
    "all_gather_into_tensor": 1,
    "all_gather": 1,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "reduce": 0,
}


class StepFacts(NamedTuple):
    """What a worker knows of its last step.

    Attributes:
        nll_sum: The sum of -ln p over its label tokens, in nats.
        labels: Its label tokens; a share of the global number where only that is known.
        loads: The assignments of each expert, for each MoE layer; empty where they are not known.
        over_ranks: Whether `loads` are those of all ranks, not of this one alone.
    """

    nll_sum: float
    labels: float
    loads: Sequence[Sequence[int]] = ()
    over_ranks: bool = False


class Gate:
    """The connection of one worker; make it at the start of the process, before other threads exist.

    The process is bound to the core of its rank. It ends when the benchmark closes the connection.
    """

    def __init__(self) -> None:
        self.rank = next(int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ)
        cores = [int(core) for core in os.environ[CORES_VARIABLE].split(",")]
        os.sched_setaffinity(0, {cores[self.rank % len(cores)]})
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[SOCKET_VARIABLE])
        self._lines = self._socket.makefile("r")
        self._counting = ExitStack()
        self._bytes: dict[str, int] = {}
        self._left, self._seconds = 1, 0.0
        self._send({"rank": self.rank})
        self._began_s = time.perf_counter()

    def pass_step(self, facts: Callable[[], StepFacts]) -> None:
        """Report the steps of a turn, if this was its last one, and wait for the next turn.

        Args:
            facts: Called after the last step of a turn, outside of the measured time.
        """
        self._seconds += time.perf_counter() - self._began_s
        self._left -= 1
        if self._left == 0:
            self._counting.close()
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self._send({"seconds": self._seconds, "peak_mib": peak_mib, "bytes": self._bytes, **facts()._asdict()})
            self._wait()
        self._began_s = time.perf_counter()

    def _wait(self) -> None:
        line = self._lines.readline()
        if not line:
            # Not by sys.exit: other ranks may be gone, and a collective at exit would wait for them.
            os._exit(0)
        turn = json.loads(line)
        self._left, self._seconds, self._bytes = turn["steps"], 0.0, {}
        if turn["count_bytes"]:
            self._counting.enter_context(counted_bytes(self._bytes))

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")


@contextmanager
def counted_bytes(found: dict[str, int]) -> Iterator[None]:
    """Count in `found` the bytes that this rank gives to each collective of torch.distributed in the block.

    Rows that this package exchanges through shared memory count as given to its all-to-all.
    """
    import torch.distributed as dist

    from dist_moe.comm.shared_memory import SharedBuffers

    write = SharedBuffers.write

    def counting_write(buffers: SharedBuffers, tensors: Sequence[Any], send: Sequence[int]) -> Any:
        total = found.get("all_to_all_single", 0) + sum(tensor.nbytes for tensor in tensors)
        found["all_to_all_single"] = total
        return write(buffers, tensors, send)

    def counting(name: str, original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            names = ("input", "input_tensor", "tensor")
            given = next((options[key] for key in names if key in options), None)
            tensor = arguments[position] if given is None else given
            found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
            return original(*arguments, **options)

        return call

    with ExitStack() as stack:
        for name, position in COLLECTIVES.items():
            replacement = counting(name, getattr(dist, name), position)
            stack.enter_context(mock.patch.object(dist, name, replacement))
        stack.enter_context(mock.patch.object(SharedBuffers, "write", counting_write))
        yield
