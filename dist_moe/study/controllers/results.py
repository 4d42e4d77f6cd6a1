"""The files of the study of controllers: results.json, series.jsonl, table.md and controllers.png."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_moe.files import write_atomically
from dist_moe.observe.record import host, source_state, versions
from dist_moe.study.controllers.figure import draw_figure
from dist_moe.study.controllers.measures import NEAR, TOLERANCE, WINDOW
from dist_moe.study.controllers.simulation import Plan, Run
from dist_moe.study.controllers.table import markdown
from dist_moe.study.controllers.variants import THRESHOLD, VARIANTS


def write_results(folder: Path, plan: Plan, runs: Sequence[Run], seconds: float) -> None:
    """Write all files, replacing those of a previous study."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"versions": versions() | {"matplotlib": version("matplotlib")}, "source": source_state(Path(__file__))}
    made |= {"host": host(), "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}
    text = json.dumps({"made": made, "settings": settings(plan), "runs": runs_as_dicts(runs)}, indent=1)
    write_atomically(folder / "results.json", text + "\n")
    lines = [
        {"experts": run.experts, "seed": run.seed, "policy": run.variant.name, "max_vio": run.max_vio} for run in runs
    ]
    write_atomically(folder / "series.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(folder / "table.md", markdown(plan, runs))
    draw_figure(folder / "controllers.png", plan, runs)


def settings(plan: Plan) -> dict[str, Any]:
    """Return everything that the results depend on, as plain values."""
    measures = {"window": WINDOW, "near": NEAR, "tolerance": TOLERANCE, "threshold": THRESHOLD}
    return (
        asdict(plan)
        | measures
        | {"variants": [asdict(variant) | {"policy": variant.policy.model_dump()} for variant in VARIANTS]}
    )


def runs_as_dicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the measures of each run as plain values."""
    return [
        {"experts": run.experts, "seed": run.seed, "policy": run.variant.name, **asdict(run.measures)} for run in runs
    ]
