"""The implementations of the steps of an MoE layer between its matmuls, by device and by what is installed."""

import functools
import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass

import torch

from dist_moe.config.sections.model import KernelsName
from dist_moe.errors import ConfigError, Violation
from dist_moe.moe.gather_sum import GatherSum, by_embedding_bag, by_gather
from dist_moe.moe.row_order import NumberRows, PlaceRows, number_rows, place_rows
from dist_moe.moe.swiglu import Gate, SwiGLU

logger = logging.getLogger(__name__)

TILE_ROWS = 16
"""Where oneDNN multiplies bf16, the rows of each expert are padded to a multiple of this in 16-bit floats.

oneDNN compiles a kernel for each number of rows that it has not met (0.4 ms each; it keeps 1,024), and an expert has
another number of rows in every step. There are few multiples of 16, which is also the height of oneDNN's tiles.
On other CPUs, such as those with AVX2 alone, PyTorch multiplies bf16 without it."""


@dataclass(frozen=True)
class Kernels:
    """How the steps of a layer are computed on one kind of device.

    Attributes:
        gather_sum: The sum of each token's rows.
        swiglu: The gate of experts whose activation is SiLU.
        number_rows: The numbers of the sorted rows.
        place_rows: The places of received rows.
        waits: Whether the host may wait for values of a tensor, as for the number of rows.
        tile_rows: The number of rows of which each expert's is made a multiple in 16-bit floats; only with `waits`.
    """

    gather_sum: GatherSum
    swiglu: Gate
    number_rows: NumberRows = number_rows
    place_rows: PlaceRows = place_rows
    waits: bool = False
    tile_rows: int = 1

    def tile(self, dtype: torch.dtype) -> int:
        """Return the number of rows of which each expert's is made a multiple."""
        return self.tile_rows if dtype.itemsize == 2 else 1


def onednn_multiplies_bf16() -> bool:
    """Return whether PyTorch multiplies bf16 by oneDNN on this CPU: it has AVX-512, or is an ARM one with bf16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


CPU = Kernels(by_embedding_bag, SwiGLU.apply, waits=True, tile_rows=TILE_ROWS if onednn_multiplies_bf16() else 1)
ANY_DEVICE = Kernels(by_gather, SwiGLU.apply)


def check_kernels(name: KernelsName, device: torch.device) -> None:
    """Check that the implementations that `model.moe_kernels` names can run, and log what a GPU goes without.

    Raises:
        ConfigError: It is triton, which cannot run here, or the device is not a GPU.
    """
    on_gpu = device.type == "cuda"
    missing = missing_for_triton() if on_gpu else f"a GPU, and the device is {device}"
    if name == "triton" and missing:
        remedy = "install it, or use auto" if on_gpu else "use auto"
        raise ConfigError([Violation("model.moe_kernels", name, f"needs {missing}", remedy)])
    if name == "auto" and on_gpu and missing:
        logger.warning("MoE layers are slower without Triton's kernels, which need %s", missing)


def kernels_for(device: torch.device, name: KernelsName = "auto") -> Kernels:
    """Return the implementations for a device, as `model.moe_kernels` names them; on a CPU there is one of each."""
    if device.type == "cpu":
        return CPU
    return triton_kernels() if device.type == "cuda" and name != "torch" and not missing_for_triton() else ANY_DEVICE


@functools.cache
def missing_for_triton() -> str:
    """Return what Triton needs and this machine does not have; "" if nothing.

    Triton compiles the function that starts a kernel when it is first used, by the compiler of the variable CC, or
    gcc, or clang.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler, and neither gcc nor clang is installed"
    return ""


@functools.cache
def triton_kernels() -> Kernels:
    """Return the implementations that need Triton, which is imported here."""
    from dist_moe.moe import triton_kernels as module

    return Kernels(module.gather_sum, module.SwiGLU.apply, module.number_rows, module.place_rows)
