"""What the MPI backend's reductions compute with: the numbers and the operations that MPI has for torch's."""

from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

MPI_DATATYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
}
STAND_INS = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""What a reduction computes with instead: the sum of 16-bit floats is rounded once, at its end."""

OPERATIONS = (
    (dist.ReduceOp.SUM, MPI.SUM, MPI.SUM, MPI.MAX),
    (dist.ReduceOp.AVG, MPI.SUM, MPI.OP_NULL, MPI.OP_NULL),
    (dist.ReduceOp.PRODUCT, MPI.PROD, MPI.PROD, MPI.MIN),
    (dist.ReduceOp.MIN, MPI.MIN, MPI.MIN, MPI.MIN),
    (dist.ReduceOp.MAX, MPI.MAX, MPI.MAX, MPI.MAX),
    (dist.ReduceOp.BAND, MPI.OP_NULL, MPI.BAND, MPI.MIN),
    (dist.ReduceOp.BOR, MPI.OP_NULL, MPI.BOR, MPI.MAX),
    (dist.ReduceOp.BXOR, MPI.OP_NULL, MPI.BXOR, MPI.BXOR),
)
"""torch's reduction, then MPI's of floats, integers and truth values, which are bytes 0 and 1."""


class ReduceBuffer:
    """The elements of `target` as MPI computes with them.

    buffer: memory and datatype for MPI; `target`'s own where that can be. op: MPI's. put_back: writes the outcome to
    `target`. Errors: TypeError where MPI has no such reduction.
    """

    def __init__(self, target: Tensor, reduction: Any, ranks: int) -> None:
        average = reduction == dist.ReduceOp.AVG
        self.op = _operation(target.dtype, reduction)
        target = target.detach()  # a collective is no operation of autograd
        self._target, self._divisor = target, ranks if average else 1
        self._work = target.to(STAND_INS.get(target.dtype, target.dtype)).contiguous()
        if target.dtype == torch.bool:
            self._work = self._work.view(torch.uint8)
        self.buffer = [memory(self._work), MPI_DATATYPES[self._work.dtype]]

    def put_back(self) -> None:
        if self._divisor > 1:
            self._work /= self._divisor
        if self._work.data_ptr() != self._target.data_ptr():
            self._target.copy_(self._work)


def _operation(dtype: torch.dtype, reduction: Any) -> MPI.Op:
    """MPI's operation for torch's reduction of such elements."""
    kind = "truth values" if dtype == torch.bool else "floats" if dtype.is_floating_point else "integers"
    name = "such reduction"
    for theirs, *ours in OPERATIONS:
        if reduction == theirs:
            name = theirs.name
            found = dict(zip(("floats", "integers", "truth values"), ours, strict=True))[kind]
            if found != MPI.OP_NULL and (dtype in MPI_DATATYPES or dtype in STAND_INS or dtype == torch.bool):
                return found
    raise TypeError(f"the MPI backend has no {name} of {dtype}; take another, or parallel.backend=gloo")


def memory(dense: Tensor) -> MPI.buffer:
    """The bytes of a tensor without gaps, which has to live as long as MPI works on them."""
    return MPI.buffer.fromaddress(dense.data_ptr(), dense.nbytes)
