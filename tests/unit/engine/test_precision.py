"""The number format: what is asked for is given, and auto follows the device."""

import pytest
import torch

from dist_moe.engine import precision
from dist_moe.engine.precision import choose_precision

CPU = torch.device("cpu")


def test_what_is_asked_for_is_given() -> None:
    assert choose_precision("fp32", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_what_the_device_computes_natively(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: native)
    assert choose_precision("auto", CPU) is dtype
