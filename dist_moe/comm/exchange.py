"""The differentiable all-to-all: rows go to the ranks that hold their experts, and their gradients come back.

Shapes: R rows sent, Q rows received, P ranks in the group, N counts for each rank.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm.shared_memory import SharedBuffers


@dataclass(frozen=True)
class Pending:
    """A collective that was started and is not awaited yet; the hang detector reads it in the frame of `wait`.

    Attributes:
        name: The name of its function in torch.distributed.
        number: The number of collectives that its group had started with it; -1 where the backend does not count.
        group: Its process group.
        work: Its handle.
    """

    name: str
    number: int
    group: dist.ProcessGroup
    work: dist.Work

    def wait(self) -> None:
        """Wait for its end; on a CUDA device the current stream does, and not the host."""
        self.work.wait()


def start_all_to_all(
    received: Tensor,
    sent: Tensor,
    group: dist.ProcessGroup,
    receive: list[int] | None = None,
    send: list[int] | None = None,
) -> Pending:
    """Start `torch.distributed.all_to_all_single`.

    Args:
        received: What arrives, by sending rank.
        sent: What is sent, by receiving rank; contiguous.
        group: The process group.
        receive: Rows from each rank; None for equally many.
        send: Rows to each rank; None for equally many.
    """
    work = dist.all_to_all_single(received, sent, receive, send, group=group, async_op=True)
    return Pending("all_to_all_single", collectives_started(group), group, work)


def collectives_started(group: Any) -> int:
    """Return the number of collectives that a group has started; -1 for None, and where the backend does not count."""
    try:
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError):
        return -1


class CountsExchange:
    """An exchange of row counts in flight, which `start_exchange_counts` began."""

    def __init__(self, sent_PN: Tensor, group: dist.ProcessGroup) -> None:
        self._sent_PN, self._received_PN = sent_PN, torch.empty_like(sent_PN)
        self._pending = start_all_to_all(self._received_PN, sent_PN, group)
        self._totals: HostCopy | None = None
        if sent_PN.is_cuda:
            self._totals = HostCopy(self._sum_by_rank, self._received_PN)

    def finish(self) -> tuple[Tensor, list[int], list[int]]:
        """Wait for the exchange.

        Returns:
            received_PN, whose row p came from rank p; and the totals by rank of what is sent and of what is received.
        """
        self._pending.wait()
        totals_2P = self._sum_by_rank() if self._totals is None else self._totals.wait()
        send, receive = totals_2P.tolist()
        return self._received_PN, send, receive

    def _sum_by_rank(self) -> Tensor:
        self._pending.wait()  # the stream on which this runs waits, too
        return torch.stack([self._sent_PN, self._received_PN]).sum(dim=2)


def start_exchange_counts(counts_PN: Tensor, group: dist.ProcessGroup) -> CountsExchange:
    """Begin to exchange row counts; a collective call without gradient.

    Args:
        counts_PN: int64; row p goes to rank p of the group.
        group: The process group.
    """
    return CountsExchange(counts_PN.contiguous(), group)


class HostCopy:
    """A copy from a CUDA device to the host that waits for nothing else on the device.

    It runs on a stream of its own, beside what is launched meanwhile on the current stream.

    Args:
        compute: Called on that stream; returns the tensor to copy.
        used: A tensor of the current stream that `compute` reads.
    """

    def __init__(self, compute: Callable[[], Tensor], used: Tensor) -> None:
        stream = copy_stream(used.device)
        with torch.cuda.stream(stream):
            source = compute()
            self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
            self._done = stream.record_event()
        used.record_stream(stream)

    def wait(self) -> Tensor:
        """Return the copy; the host waits until it is complete."""
        self._done.synchronize()
        return self._copy


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which a device's copies to the host run."""
    return torch.cuda.Stream(device)


class RowsExchange:
    """An exchange of rows in flight, which `start_exchange_rows` began.

    Attributes:
        send: send[p] rows go to rank p.
        receive: receive[p] rows come from rank p.
        started: The tensors to be filled, with the graph.
    """

    def __init__(
        self, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, buffers: SharedBuffers | None
    ) -> None:
        self.send, self.receive = list(send), list(receive)
        self.started: tuple[Tensor, ...] = ()
        self._group, self._buffers = group, buffers
        self._running: _Running | None = None

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for the exchange.

        Returns:
            Tensors of Q rows each, ordered by sending rank.
        """
        started, self.started = self.started, ()
        received: tuple[Tensor, ...] = _Finish.apply(self, *started)
        return received

    def begin(self, tensors: Sequence[Tensor], send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        """Start to exchange tensors -> tensors that `end` returns filled."""
        received = tuple(rows.new_empty(sum(receive), *rows.shape[1:]) for rows in tensors)
        running = _Running([rows.contiguous() for rows in tensors], received, send, receive)
        if self._buffers is None or not tensors[0].is_cpu:
            running.pending = self._start_on_network(running)
        else:
            messages_PM = self._buffers.write(running.sent, send)
            running.messages_PM = torch.empty_like(messages_PM)
            running.pending = [start_all_to_all(running.messages_PM, messages_PM, self._group)]
        self._running = running
        return received

    def end(self) -> tuple[Tensor, ...]:
        """Wait until the tensors of `begin` are filled, and return them."""
        running, self._running = self._running, None
        assert running is not None
        for pending in running.pending:
            pending.wait()
        if self._buffers is not None and running.messages_PM is not None:
            parts = (running.sent, running.send, running.receive, running.received)
            if not self._buffers.read(running.messages_PM, *parts):
                for pending in self._start_on_network(running):
                    pending.wait()
        return running.received

    def _start_on_network(self, running: "_Running") -> list[Pending]:
        """Start one all-to-all for each tensor."""
        return [
            start_all_to_all(there, here, self._group, running.receive, running.send)
            for there, here in zip(running.received, running.sent, strict=True)
        ]


@dataclass
class _Running:
    """Tensors between `begin` and `end`.

    Attributes:
        sent: Contiguous.
        received: To be filled.
        send: Rows of each tensor to each rank.
        receive: Rows from each rank.
        pending: What has to be awaited.
        messages_PM: Where the rows are in shared memory (`SharedBuffers.write`); None where they take the network.
    """

    sent: list[Tensor]
    received: tuple[Tensor, ...]
    send: list[int]
    receive: list[int]
    pending: list[Pending] = field(default_factory=list)
    messages_PM: Tensor | None = None


def start_exchange_rows(
    tensors: Sequence[Tensor],
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    buffers: SharedBuffers | None = None,
) -> RowsExchange:
    """Begin to exchange consecutive blocks of rows; any block may be empty, in both directions, even all of them.

    The gradients take the opposite way: their exchange begins in the backward of `RowsExchange.finish`, and is awaited
    in that of this function, so that what runs between the two runs beside the exchange in both directions. Every rank
    of the group has to call this, forward and backward, in the same order.

    Args:
        tensors: Tensors of R rows each, ordered by receiving rank.
        send: send[p] rows go to rank p.
        receive: receive[p] rows come from rank p.
        group: The process group.
        buffers: Shared memory of the group, for tensors on the CPU; on all its ranks, or on none.
    """
    exchange = RowsExchange(send, receive, group, buffers)
    exchange.started = _Start.apply(exchange, *tensors)
    return exchange


def exchange_rows(
    tensors: Sequence[Tensor],
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    buffers: SharedBuffers | None = None,
) -> tuple[Tensor, ...]:
    """Exchange consecutive blocks of rows, as `start_exchange_rows`, and wait for them.

    Returns:
        Tensors of Q rows each, ordered by sending rank.
    """
    return start_exchange_rows(tensors, send, receive, group, buffers).finish()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: RowsExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.begin(tensors, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *ctx.exchange.end()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: RowsExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.end()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        exchange = ctx.exchange
        exchange.begin(gradients, exchange.receive, exchange.send)
        return None, *gradients  # of the shape that autograd expects; `_Start` has those that arrive
