"""Which number format a device computes fast in."""

from pathlib import Path

import torch


def choose_precision(requested: str, device: torch.device) -> torch.dtype:
    """torch.float32 or torch.bfloat16 for `train.precision`; "auto" asks the device.

    auto takes bf16 on a CUDA device that multiplies it natively, and on a CPU whose flags name avx512_bf16 or
    amx_bf16: elsewhere a CPU emulates bf16 and is slower than in fp32.
    """
    if requested != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[requested]
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
