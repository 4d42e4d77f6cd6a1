"""A backend of torch.distributed over MPI, for tensors on the CPU: `parallel.backend: mpi`.

Each collective is one nonblocking MPI operation on the memory of the tensors themselves; only 16-bit floats, which MPI
cannot add, and tensors with gaps travel by a copy. A blocking MPI call would have no time-out. MPI orders operations by
the communicator that they are started on: each process group has one of its own.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from dist_moe.comm.mpi.reduce_ops import ReduceBuffer, memory
from dist_moe.comm.mpi.work import ContiguousView, Work, clone_if_overlapping, concat, run_all, scatter_into

NAME = "mpi4py"
"""The backend's name in torch, whose own "mpi" has to be compiled in."""

UNITS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}
"""What carries elements that nobody computes with, by their bytes; MPI counts to 2^31, so not in bytes."""


def register() -> str:
    """Make the backend known to torch -> the name to give to `dist.init_process_group`."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create_group, extended_api=True, devices=["cpu"])
    return NAME


def all_gather_objects(value: Any) -> list[Any]:
    """What every rank of the MPI job gives, in their order; before torch has a process group."""
    return MPI.COMM_WORLD.allgather(value)


def library() -> str:
    """The name and version of the MPI that mpi4py found."""
    return MPI.Get_library_version().partition(",")[0].splitlines()[0]


def world_size() -> int:
    """How many workers MPI started; 1 where it did not."""
    return int(MPI.COMM_WORLD.size)


def _create_group(options: Any, _: Any) -> "MPIGroup":
    """What torch calls for each process group, on its members.

    options.global_ranks_in_group is empty for the group of all. Errors: RuntimeError where torch's ranks are not MPI's.
    """
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    if options.group_size > world.size or ranks[options.group_rank] != world.rank:
        raise RuntimeError(
            f"rank {ranks[options.group_rank]} of a group of {options.group_size} is rank {world.rank} of "
            f"{world.size} for MPI; start the workers by mpirun, which gives both their ranks, or use "
            "parallel.backend=gloo"
        )
    return MPIGroup(world.Create_group(world.group.Incl(ranks)), options.timeout)


POINT_TO_POINT = ("send", "receive")


class MPIGroup(dist.ProcessGroup):
    """The ranks of one MPI communicator, with the collectives that torch calls on a process group.

    Arguments and the fields of `opts` are torch's; roots and peers are ranks of the group. Each method returns at once;
    the tensors are free when the work is done. Errors: TypeError for a reduction that MPI has not.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm, self._timeout = comm, timeout
        self._started: set[Work] = set()
        self._collectives = 0

    def getBackendName(self) -> str:
        return NAME

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def _get_sequence_number_for_group(self) -> int:
        return self._collectives

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        dense = ContiguousView(tensors[0])
        request = self._comm.Ibcast(_elements(dense.tensor), root=opts.rootRank)
        return self._work("broadcast", [request], dense, tensors, dense.put_back)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Work:
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> Work:
        sums = [ReduceBuffer(tensor, opts.reduceOp, self._comm.size) for tensor in tensors]
        requests = [self._comm.Iallreduce(MPI.IN_PLACE, one.buffer, op=one.op) for one in sums]
        return self._work("all-reduce", requests, sums, tensors, run_all([one.put_back for one in sums]))

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        one, is_root = ReduceBuffer(tensors[0], opts.reduceOp, self._comm.size), self._comm.rank == opts.rootRank
        given, taken = (MPI.IN_PLACE, one.buffer) if is_root else (one.buffer, None)
        request = self._comm.Ireduce(given, taken, op=one.op, root=opts.rootRank)
        return self._work("reduce", [request], one, tensors, one.put_back if is_root else None)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        taken = [ContiguousView(one) for one in outputs]
        given = [self._part(one.contiguous(), all_of.tensor) for one, all_of in zip(inputs, taken, strict=True)]
        requests = [
            self._comm.Iallgather(MPI.IN_PLACE if one is None else _elements(one), _elements(all_of.tensor))
            for one, all_of in zip(given, taken, strict=True)
        ]
        return self._work("all-gather", requests, (given, taken), outputs, run_all([one.put_back for one in taken]))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        return self._gather_all([outputs[0]], inputs)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        return self._gather_all([list(of_input) for of_input in zip(*outputs, strict=True)], inputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        given = inputs[0].contiguous()
        if self._comm.rank != opts.rootRank:
            return self._work("gather", [self._comm.Igather(_elements(given), None, root=opts.rootRank)], given)
        taken = given.new_empty(self._comm.size * given.numel())
        request = self._comm.Igather(_elements(given), _elements(taken), root=opts.rootRank)
        return self._work("gather", [request], (given, taken), outputs[0], scatter_into(taken, outputs[0]))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        taken = ContiguousView(outputs[0])
        given = concat(inputs[0]) if self._comm.rank == opts.rootRank else None
        source = None if given is None else _elements(given)
        request = self._comm.Iscatter(source, _elements(taken.tensor), root=opts.rootRank)
        return self._work("scatter", [request], (given, taken), outputs, taken.put_back)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        return self.reduce_scatter(outputs, [[one] for one in inputs], opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        """inputs[i]: what is added for all ranks, one tensor for each, or one of the parts of all."""
        held, requests = [], []
        for output, parts in zip(outputs, inputs, strict=True):
            given = ReduceBuffer(clone_if_overlapping(concat(parts), output), opts.reduceOp, self._comm.size)
            taken = ReduceBuffer(output, opts.reduceOp, self._comm.size)
            if len({one.numel() for one in parts}) == 1:
                requests.append(self._comm.Ireduce_scatter_block(given.buffer, taken.buffer, op=given.op))
            else:
                sizes = [one.numel() for one in parts]
                requests.append(self._comm.Ireduce_scatter(given.buffer, taken.buffer, sizes, op=given.op))
            held.append((given, taken))
        return self._work("reduce-scatter", requests, held, outputs, run_all([one.put_back for _, one in held]))

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Work:
        given, taken = clone_if_overlapping(input.contiguous(), output), ContiguousView(output)
        request = self._comm.Ialltoallv(
            _blocks(given, self._row_blocks(given, input_splits)),
            _blocks(taken.tensor, self._row_blocks(output, output_splits)),
        )
        return self._work("all-to-all", [request], (given, taken), [output], taken.put_back)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        given, sizes = concat(inputs), [one.numel() for one in outputs]
        taken = given.new_empty(sum(sizes))
        request = self._comm.Ialltoallv(_blocks(given, [one.numel() for one in inputs]), _blocks(taken, sizes))
        return self._work("all-to-all", [request], (given, taken), outputs, scatter_into(taken, outputs))

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work:
        given = tensors[0].contiguous()
        return self._work("send", [self._comm.Isend(_elements(given), dest=dst, tag=tag)], given)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work:
        taken = ContiguousView(tensors[0])
        request = self._comm.Irecv(_elements(taken.tensor), source=src, tag=tag)
        return self._work("receive", [request], taken, tensors, taken.put_back)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Work:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def barrier(self, opts: Any = None) -> Work:
        return self._work("barrier", [self._comm.Ibarrier()], ())

    _allgather_base = all_gather_single  # torch 2.11's names, from here on
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _part(self, given: Tensor, whole: Tensor) -> Tensor | None:
        """What this rank gives to a whole; None if it lies there already."""
        in_place = given.data_ptr() == whole.data_ptr() + self._comm.rank * given.nbytes
        return None if in_place else clone_if_overlapping(given, whole)

    def _gather_all(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work:
        """outputs[i][r]: what rank r has in inputs[i]. The sizes of one i may differ from rank to rank."""
        given = [one.contiguous() for one in inputs]
        sizes = [[one.numel() for one in of_input] for of_input in outputs]
        taken = [one.new_empty(sum(size)) for one, size in zip(given, sizes, strict=True)]
        requests = [
            self._comm.Iallgatherv(_elements(source), _blocks(target, size))
            for source, target, size in zip(given, taken, sizes, strict=True)
        ]
        finish = run_all([scatter_into(flat, of_input) for flat, of_input in zip(taken, outputs, strict=True)])
        return self._work("all-gather", requests, (given, taken), [t for one in outputs for t in one], finish)

    def _row_blocks(self, rows: Tensor, splits: Sequence[int]) -> list[int]:
        """How many elements each rank has a part in, where `splits` counts rows; empty for equal parts."""
        if not splits:
            return [rows.numel() // self._comm.size] * self._comm.size
        width = math.prod(rows.shape[1:])
        return [count * width for count in splits]

    def _work(
        self,
        what: str,
        requests: list[MPI.Request],
        held: Any,
        outputs: Sequence[Tensor] = (),
        finish: Callable[[], None] | None = None,
    ) -> Work:
        for forgotten in tuple(self._started):
            forgotten.is_completed()
        self._collectives += what not in POINT_TO_POINT
        statuses = [MPI.Status() for _ in requests]
        return Work(
            f"{what} among {self._comm.size} ranks",
            lambda: MPI.Request.Testall(requests, statuses),
            held,
            self._timeout,
            outputs,
            finish,
            self._started,
            lambda: statuses[0].Get_source(),
        )


def _elements(dense: Tensor) -> list[Any]:
    """All of a tensor as one message."""
    return [memory(dense), UNITS[dense.element_size()]]


def _blocks(dense: Tensor, sizes: Sequence[int]) -> list[Any]:
    """A tensor as consecutive messages of these numbers of elements, one for each rank."""
    return [memory(dense), (sizes, [0, *itertools.accumulate(sizes)][:-1]), UNITS[dense.element_size()]]
