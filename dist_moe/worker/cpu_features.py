"""What the CPU of this host computes natively. Imports no torch."""

import functools
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def multiplies_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU has instructions that multiply bf16: its flags include avx512_bf16 or amx_bf16.

    Other CPUs compute bf16 by way of fp32, and more slowly than fp32.

    Args:
        cpuinfo: The file in which the kernel describes the CPU; without it the answer is False.
    """
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
