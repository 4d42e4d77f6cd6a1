"""Chooses the number format of training."""

import logging

import torch

from dist_moe.worker.cpu_features import multiplies_bf16

logger = logging.getLogger(__name__)


def choose_precision(requested: str, device: torch.device) -> torch.dtype:
    """Return torch.float32 or torch.bfloat16 for `train.precision`.

    "auto" is bf16 on a CUDA device with native bf16, and on a CPU whose flags include avx512_bf16 or amx_bf16; other
    CPUs emulate bf16 and are slower than in fp32.
    """
    if requested != "auto":
        logger.info("precision %s, as train.precision requests", requested)
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[requested]
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else multiplies_bf16()
    chosen = "bf16" if native else "fp32"
    logger.info(
        "precision %s (train.precision=auto): bf16 is %s on %s", chosen, "native" if native else "emulated", device
    )
    return torch.bfloat16 if native else torch.float32
