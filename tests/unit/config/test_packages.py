"""Tests of the optional packages that a configuration needs: what is missing is said before a run starts."""

from pathlib import Path

import pytest

from dist_moe.config import load_config
from dist_moe.config.checks import packages
from dist_moe.config.resolve import plain_violations

CONFIG = Path(__file__).parents[3] / "configs" / "debug.yaml"


@pytest.mark.parametrize(("interval", "installed", "refused"), [(0, False, False), (5, True, False), (5, False, True)])
def test_a_trace_without_pyarrow_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, interval: int, installed: bool, refused: bool
) -> None:
    monkeypatch.setattr(packages, "has_pyarrow", lambda: installed)
    found = plain_violations(load_config(CONFIG, [f"observe.trace_interval={interval}"]), workers=2)
    if not refused:
        assert found == []
        return
    (violation,) = found
    assert (violation.key, violation.value) == ("observe.trace_interval", 5)
    assert "pyarrow is not installed" in violation.rule
    assert "pip install -c constraints.txt '.[arrow]'" in violation.remedy and "set it to 0" in violation.remedy
