"""What the CPU computes natively, as the kernel describes it."""

from pathlib import Path

import pytest

from dist_moe.worker.cpu_features import multiplies_bf16


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("fpu sse avx512f avx512_bf16", True),
        ("fpu amx_tile amx_bf16 avx2", True),
        ("fpu sse avx512f avx2", False),
        ("fpu avx512_bf16x", False),
    ],
)
def test_a_cpu_multiplies_bf16_where_its_flags_say_so(tmp_path: Path, flags: str, native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert multiplies_bf16(cpuinfo) is native


def test_without_the_file_or_without_flags_it_does_not(tmp_path: Path) -> None:
    assert not multiplies_bf16(tmp_path / "no file")
    (tmp_path / "cpuinfo").write_text("processor: 0\nFeatures: bf16\n")
    assert not multiplies_bf16(tmp_path / "cpuinfo")
