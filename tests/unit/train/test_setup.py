"""What a run refuses before it opens its folder."""

from pathlib import Path

import pytest
import torch

from tests.dist.resumable import write_text
from tests.unit.train.runs import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("choice", ["model.cross_entropy=liger", "model.moe_kernels=triton"])
def test_what_the_device_cannot_compute_is_refused_before_the_first_step(tmp_path: Path, choice: str) -> None:
    done = train(write_text(tmp_path), tmp_path / "run", choice)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{choice} needs a GPU, and the device is cpu; use auto" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()
