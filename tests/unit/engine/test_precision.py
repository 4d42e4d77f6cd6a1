"""The number format: what is asked for is given, and auto follows the device."""

from pathlib import Path

import pytest
import torch

from dist_moe.engine.precision import _cpu_has_bf16, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("fpu sse avx512f avx512_bf16", True),
        ("fpu amx_tile amx_bf16 avx2", True),
        ("fpu sse avx512f avx2", False),
        ("fpu avx512_bf16x", False),
    ],
)
def test_a_cpu_has_bf16_where_its_flags_say_so(tmp_path: Path, flags: str, native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert _cpu_has_bf16(cpuinfo) is native


def test_a_host_without_the_file_or_without_flags_has_none(tmp_path: Path) -> None:
    assert not _cpu_has_bf16(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor: 0\nFeatures: bf16\n")
    assert not _cpu_has_bf16(tmp_path / "cpuinfo")


def test_what_is_asked_for_is_given() -> None:
    assert choose_precision("fp32", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16


def test_auto_takes_what_the_device_computes_natively() -> None:
    assert choose_precision("auto", CPU) is (torch.bfloat16 if _cpu_has_bf16() else torch.float32)
