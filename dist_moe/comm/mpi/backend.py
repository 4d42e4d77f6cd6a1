"""A backend of torch.distributed over MPI, for tensors on the CPU: `parallel.backend: mpi`.

Each collective is one nonblocking MPI operation on the memory of the tensors themselves; only 16-bit floats, which MPI
cannot add, and tensors that are not contiguous are copied. A blocking MPI call would have no time-out. MPI orders
operations by the communicator on which they are started, so each process group has one of its own.
"""

import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from dist_moe.comm.mpi.reduce_ops import ReduceBuffer, memory
from dist_moe.comm.mpi.work import ContiguousView, Work, clone_if_overlapping, concat, run_all, scatter_into
from dist_moe.comm.objects import Object, check_sizes, decode_all, encode
from dist_moe.text import counted

NAME = "mpi4py"
"""The backend's name in torch; its own "mpi" has to be compiled in."""

UNITS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}
"""MPI datatypes for elements that are only moved, by size in bytes; MPI counts to 2^31, too few for bytes alone."""


def register() -> str:
    """Register the backend in torch, and return its name for `dist.init_process_group`."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create_group, extended_api=True, devices=["cpu"])
    return NAME


def all_gather_objects(own: Object, kind: type[Object]) -> list[Object]:
    """Return the value of every rank of the MPI job, by rank; needs no process group of torch.

    Arguments and errors are those of `dist_moe.comm.objects.all_gather_objects`.
    """
    content, sizes = encode(own), array("q", [0] * MPI.COMM_WORLD.size)
    # The methods of mpi4py in lower case exchange pickles.
    MPI.COMM_WORLD.Allgather(array("q", [len(content)]), sizes)
    check_sizes(sizes)
    gathered = bytearray(sum(sizes))
    MPI.COMM_WORLD.Allgatherv(content, [gathered, list(sizes), MPI.BYTE])
    ends = list(itertools.accumulate(sizes))
    return decode_all([bytes(gathered[end - size : end]) for end, size in zip(ends, sizes, strict=True)], kind)


def library() -> str:
    """Return the name and version of the MPI library that mpi4py uses."""
    return MPI.Get_library_version().partition(",")[0].splitlines()[0]


def world_size() -> int:
    """Return the number of workers that MPI started; 1 where MPI did not start this process."""
    return int(MPI.COMM_WORLD.size)


def _create_group(options: Any, _: Any) -> "MPIGroup":
    """Create a process group; torch calls this on each member.

    Args:
        options: torch's; its global_ranks_in_group is empty for the default group.

    Raises:
        RuntimeError: torch's ranks are not those of MPI.
    """
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    if options.group_size > world.size or ranks[options.group_rank] != world.rank:
        raise RuntimeError(
            f"rank {ranks[options.group_rank]} of a group of {options.group_size} is rank {world.rank} of "
            f"{world.size} in MPI; start the workers with mpirun, which sets the ranks of both, or use "
            "parallel.backend=gloo"
        )
    return MPIGroup(world.Create_group(world.group.Incl(ranks)), options.timeout)


POINT_TO_POINT = ("send", "receive")


class MPIGroup(dist.ProcessGroup):
    """The ranks of one MPI communicator, with the collectives that torch calls on a process group.

    Arguments and the fields of `opts` are torch's; roots and peers are ranks of the group. Each method returns at once;
    the tensors may be used again when the work is complete.

    Raises:
        TypeError: MPI has no such reduction for the dtype.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm, self._timeout = comm, timeout
        self._in_flight: set[Work] = set()
        self._collectives = 0

    def getBackendName(self) -> str:
        return NAME

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def _get_sequence_number_for_group(self) -> int:
        return self._collectives

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        view = ContiguousView(tensors[0])
        request = self._comm.Ibcast(_elements(view.tensor), root=opts.rootRank)
        return self._work("broadcast", [request], view, tensors, view.copy_back)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Work:
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> Work:
        # A single rank has the result already; MPI would copy it, and 16-bit floats twice.
        reduced = tensors if self._comm.size > 1 else []
        reductions = [ReduceBuffer(tensor, opts.reduceOp, self._comm.size) for tensor in reduced]
        requests = [self._comm.Iallreduce(MPI.IN_PLACE, one.buffer, op=one.op) for one in reductions]
        return self._work("all-reduce", requests, reductions, tensors, run_all([one.copy_back for one in reductions]))

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        reduction = ReduceBuffer(tensors[0], opts.reduceOp, self._comm.size)
        is_root = self._comm.rank == opts.rootRank
        source, target = (MPI.IN_PLACE, reduction.buffer) if is_root else (reduction.buffer, None)
        request = self._comm.Ireduce(source, target, op=reduction.op, root=opts.rootRank)
        return self._work("reduce", [request], reduction, tensors, reduction.copy_back if is_root else None)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        views = [ContiguousView(output) for output in outputs]
        sources = [self._part(one.contiguous(), view.tensor) for one, view in zip(inputs, views, strict=True)]
        requests = [
            self._comm.Iallgather(MPI.IN_PLACE if source is None else _elements(source), _elements(view.tensor))
            for source, view in zip(sources, views, strict=True)
        ]
        finish = run_all([view.copy_back for view in views])
        return self._work("all-gather", requests, (sources, views), outputs, finish)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        return self._gather_all([outputs[0]], inputs)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        return self._gather_all([list(of_input) for of_input in zip(*outputs, strict=True)], inputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        source = inputs[0].contiguous()
        if self._comm.rank != opts.rootRank:
            return self._work("gather", [self._comm.Igather(_elements(source), None, root=opts.rootRank)], source)
        target = source.new_empty(self._comm.size * source.numel())
        request = self._comm.Igather(_elements(source), _elements(target), root=opts.rootRank)
        return self._work("gather", [request], (source, target), outputs[0], scatter_into(target, outputs[0]))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        target = ContiguousView(outputs[0])
        source = concat(inputs[0]) if self._comm.rank == opts.rootRank else None
        message = None if source is None else _elements(source)
        request = self._comm.Iscatter(message, _elements(target.tensor), root=opts.rootRank)
        return self._work("scatter", [request], (source, target), outputs, target.copy_back)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        return self.reduce_scatter(outputs, [[one] for one in inputs], opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        """Reduce inputs[i], one tensor per rank or one tensor with the parts of all ranks, into outputs[i]."""
        buffers, requests = [], []
        for output, parts in zip(outputs, inputs, strict=True):
            source = ReduceBuffer(clone_if_overlapping(concat(parts), output), opts.reduceOp, self._comm.size)
            target = ReduceBuffer(output, opts.reduceOp, self._comm.size)
            if len({one.numel() for one in parts}) == 1:
                requests.append(self._comm.Ireduce_scatter_block(source.buffer, target.buffer, op=source.op))
            else:
                sizes = [one.numel() for one in parts]
                requests.append(self._comm.Ireduce_scatter(source.buffer, target.buffer, sizes, op=source.op))
            buffers.append((source, target))
        return self._work("reduce-scatter", requests, buffers, outputs, run_all([one.copy_back for _, one in buffers]))

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Work:
        source, target = clone_if_overlapping(input.contiguous(), output), ContiguousView(output)
        request = self._comm.Ialltoallv(
            _blocks(source, self._row_blocks(source, input_splits)),
            _blocks(target.tensor, self._row_blocks(output, output_splits)),
        )
        return self._work("all-to-all", [request], (source, target), [output], target.copy_back)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        source, sizes = concat(inputs), [one.numel() for one in outputs]
        target = source.new_empty(sum(sizes))
        request = self._comm.Ialltoallv(_blocks(source, [one.numel() for one in inputs]), _blocks(target, sizes))
        return self._work("all-to-all", [request], (source, target), outputs, scatter_into(target, outputs))

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work:
        source = tensors[0].contiguous()
        return self._work("send", [self._comm.Isend(_elements(source), dest=dst, tag=tag)], source)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work:
        target = ContiguousView(tensors[0])
        request = self._comm.Irecv(_elements(target.tensor), source=src, tag=tag)
        return self._work("receive", [request], target, tensors, target.copy_back)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Work:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def barrier(self, opts: Any = None) -> Work:
        return self._work("barrier", [self._comm.Ibarrier()], ())

    # The names of these methods in torch 2.11.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _part(self, source: Tensor, whole: Tensor) -> Tensor | None:
        """Return what this rank contributes to `whole`; None if its part is in place already."""
        in_place = source.data_ptr() == whole.data_ptr() + self._comm.rank * source.nbytes
        return None if in_place else clone_if_overlapping(source, whole)

    def _gather_all(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work:
        """Gather inputs[i] of rank r into outputs[i][r]; the sizes may differ between ranks."""
        sources = [one.contiguous() for one in inputs]
        sizes = [[one.numel() for one in of_input] for of_input in outputs]
        flats = [one.new_empty(sum(size)) for one, size in zip(sources, sizes, strict=True)]
        requests = [
            self._comm.Iallgatherv(_elements(source), _blocks(target, size))
            for source, target, size in zip(sources, flats, sizes, strict=True)
        ]
        finish = run_all([scatter_into(flat, of_input) for flat, of_input in zip(flats, outputs, strict=True)])
        parts = [part for of_input in outputs for part in of_input]
        return self._work("all-gather", requests, (sources, flats), parts, finish)

    def _row_blocks(self, rows: Tensor, splits: Sequence[int]) -> list[int]:
        """Return the number of elements for each rank; `splits` counts rows, and is empty for equal parts."""
        if not splits:
            return [rows.numel() // self._comm.size] * self._comm.size
        width = math.prod(rows.shape[1:])
        return [count * width for count in splits]

    def _work(
        self,
        kind: str,
        requests: list[MPI.Request],
        tensors: Any,
        outputs: Sequence[Tensor] = (),
        finish: Callable[[], None] | None = None,
    ) -> Work:
        # MPI makes progress, and finished work is released, also where the caller dropped the handle.
        for work in tuple(self._in_flight):
            work.is_completed()
        self._collectives += kind not in POINT_TO_POINT
        statuses = [MPI.Status() for _ in requests]
        return Work(
            f"{kind} among {counted(self._comm.size, 'rank')}",
            lambda: MPI.Request.Testall(requests, statuses),
            tensors,
            self._timeout,
            outputs,
            finish,
            self._in_flight,
            lambda: statuses[0].Get_source(),
        )


def _elements(tensor: Tensor) -> list[Any]:
    """Describe a contiguous tensor as one message."""
    return [memory(tensor), UNITS[tensor.element_size()]]


def _blocks(tensor: Tensor, sizes: Sequence[int]) -> list[Any]:
    """Describe a contiguous tensor as consecutive messages of the given numbers of elements, one for each rank."""
    return [memory(tensor), (sizes, [0, *itertools.accumulate(sizes)][:-1]), UNITS[tensor.element_size()]]
