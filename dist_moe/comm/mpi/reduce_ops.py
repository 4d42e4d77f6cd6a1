"""Reductions of the MPI backend: the datatypes and operations of MPI that correspond to torch's."""

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
COMPUTE_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""MPI has no 16-bit floats. In fp32 a sum is rounded once, at its end, instead of after each addition."""

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
"""torch's reduction, then MPI's for floats, integers and booleans, which are bytes 0 and 1."""
KINDS = ("floats", "integers", "booleans")


class ReduceBuffer:
    """The elements of a tensor in a form that MPI can reduce.

    Args:
        target: The tensor.
        reduction: torch's reduction.
        ranks: Number of ranks, for averages.

    Attributes:
        buffer: Memory and datatype for MPI; the target's own memory where possible.
        op: MPI's operation.

    Raises:
        TypeError: MPI has no such reduction for the dtype.
    """

    def __init__(self, target: Tensor, reduction: Any, ranks: int) -> None:
        self.op = _operation(target.dtype, reduction)
        target = target.detach()  # autograd does not track collectives
        self._target, self._divisor = target, ranks if reduction == dist.ReduceOp.AVG else 1
        self._values = target.to(COMPUTE_DTYPES.get(target.dtype, target.dtype)).contiguous()
        if target.dtype == torch.bool:
            self._values = self._values.view(torch.uint8)
        self.buffer = [memory(self._values), MPI_DATATYPES[self._values.dtype]]

    def copy_back(self) -> None:
        """Write the result to the target."""
        if self._divisor > 1:
            self._values /= self._divisor
        if self._values.data_ptr() != self._target.data_ptr():
            self._target.copy_(self._values)


def _operation(dtype: torch.dtype, reduction: Any) -> MPI.Op:
    """Return MPI's operation for torch's reduction of a dtype."""
    kind = "booleans" if dtype == torch.bool else "floats" if dtype.is_floating_point else "integers"
    name = "such reduction"
    for torch_op, *mpi_ops in OPERATIONS:
        if reduction == torch_op:
            name = torch_op.name
            operation = dict(zip(KINDS, mpi_ops, strict=True))[kind]
            if operation != MPI.OP_NULL and (dtype in MPI_DATATYPES or dtype in COMPUTE_DTYPES or dtype == torch.bool):
                return operation
    raise TypeError(f"the MPI backend has no {name} of {dtype}; use another reduction, or parallel.backend=gloo")


def memory(tensor: Tensor) -> MPI.buffer:
    """Return the bytes of a contiguous tensor, which has to stay alive as long as MPI uses them."""
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
