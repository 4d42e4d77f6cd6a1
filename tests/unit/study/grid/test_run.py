"""Tests of whole studies: real runs of two workers, their results, and how they resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_moe.config.yaml_io import read_mapping, render
from dist_moe.errors import UserError
from dist_moe.study.grid.claims import Claim
from dist_moe.study.grid.page import Column, Study
from dist_moe.study.grid.run import Part, Place, check_study, run_study
from dist_moe.study.grid.store import read_results

ROOT = Path(__file__).parents[4]
STUDY = Study(
    name="loss_free",
    title="A title",
    introduction="What is trained.",
    columns=(
        Column("loss", "validation_loss", 4),
        Column("MaxVio", "max_vio_global", 3),
        Column("run, s", "wall_s", 0),
    ),
    claims=lambda results: [Claim("Both arms have a result", "holds", f"{len(results.arms)} arms")],
    sections=lambda results, folder: ["### A section", ""],
    notes="How.",
)


def make_place(tmp_path: Path, **train: object) -> Place:
    """Write the plan of a study of two arms on a small text, and return its place."""
    text = "".join(f"line {number} of a text that is long enough to be split\n" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    config = read_mapping(ROOT / "configs" / "debug.yaml")
    config["data"] |= {"sources": [str(tmp_path / "text.txt")], "sequence_length": 32}
    config["train"] |= {"steps": 2, "warmup_steps": 0, **train}
    config |= {"observe": {"interval": 1, "tensorboard": False}, "checkpoint": {"resume": "never"}}
    config["run"] = {"threads": 1}
    plan = {
        "config": config,
        "arms": {"none": {"balance": {"policy": "none"}}, "b": {"balance": {"policy": "quantile"}}},
        "presets": {"small": {"seeds": [0], "time_limit_minutes": 5}},
        "checked": ["b"],
        "analyzed": True,
    }
    (tmp_path / "plan.yaml").write_text(render(plan))
    return Place(tmp_path / "plan.yaml", tmp_path / "out" / "loss_free", tmp_path / "runs")


@pytest.mark.slow
def test_a_study_is_trained_once_and_its_page_written_from_the_results(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), list[str]()
    results = run_study(STUDY, place, Part("small"), log.append)
    assert log[0] == "2 cells, 0 of them finished" and [line for line in log if "training" in line] == [
        "training none, seed 0",
        "training b, seed 0",
    ]
    recorded = read_results(place.out / "results.json")
    assert [result.key for result in recorded] == [("", "none", 0), ("", "b", 0)] == [r.key for r in results.all]
    for result in recorded:
        assert 3 < (result.values["validation_loss"] or 0) < 7 and (result.values["wall_s"] or 0) > 1
        assert (result.values["max_vio_global_worst"] or 0) >= (result.values["max_vio_global"] or 0) > 0
        assert result.curves["step"] == [1, 2] and len(result.curves["max_vio"]) == 2
        by_layer = result.loads["by_domain"]
        routed = {sum(sum(row) for row in layer) for layer in by_layer}
        metrics = tmp_path / "runs" / result.arm / "seed-0" / "run" / "metrics.jsonl"
        (evaluation,) = (json.loads(line) for line in metrics.read_text().splitlines() if '"validation"' in line)
        assert [[sum(row[e] for row in layer) for e in range(len(layer[0]))] for layer in by_layer] == evaluation[
            "load"
        ]
        assert len(routed) == 1, "every layer routes each token to the same number of experts"
        assert not (metrics.parent / "checkpoints").exists()
    page = place.page.read_text()
    assert page.startswith("# A title\n") and "- Both arms have a result: 2 arms." in page
    assert "All 2 runs of the plan are finished." in page and "| none |" in page and "### A section" in page

    again = run_study(STUDY, place, Part("small"), log.append)
    assert log[-1] == "2 cells, 2 of them finished" and again.all == recorded, "nothing is trained again"

    found = check_study(STUDY, place, place.out, "small", log.append)
    assert [one.measure for one in found] == ["loss", "MaxVio"] and all(one.agrees for one in found)
    assert all(one.recorded == one.repeated for one in found), "the same machine gives the same bits"


@pytest.mark.slow
@pytest.mark.full
def test_a_result_that_another_run_contradicts_fails_the_check(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    run_study(STUDY, place, Part("small"), lambda line: None)
    path = place.out / "results.json"
    content = json.loads(path.read_text())
    content["cells"][1]["values"]["validation_loss"] += 0.5
    path.write_text(json.dumps(content))
    loss, max_vio = check_study(STUDY, place, place.out, "small", lambda line: None)
    assert not loss.agrees and max_vio.agrees


@pytest.mark.slow
def test_a_failed_run_is_reported_with_its_output_and_keeps_nothing(tmp_path: Path) -> None:
    place = make_place(tmp_path, learning_rate=1e30, skip_limit=1, gradient_clipping=0)
    log: list[str] = []
    with pytest.raises(
        UserError, match=r"2 cells failed:\nnone, seed 0 ended with exit code \d+; correct the"
    ) as error:
        run_study(STUDY, place, Part("small"), log.append)
    assert str(error.value).count("its output ends:") == 2 and log[-1] == "failed: b, seed 0"
    assert "0 of 2 runs of the plan are finished." in place.page.read_text()
    assert read_results(place.out / "results.json") == []


@pytest.mark.slow
def test_sigterm_ends_the_run_of_the_cell_too(tmp_path: Path) -> None:
    place = make_place(tmp_path, steps=100_000)
    code = (
        "from pathlib import Path; from dist_moe.study.grid.run import *;"
        "from tests.unit.study.grid.test_run import STUDY;"
        f"run_study(STUDY, Place(Path({str(place.plan)!r}), Path({str(place.out)!r}), Path({str(place.runs)!r})), "
        "Part('small'), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    output = place.runs / "none" / "seed-0" / "output.txt"
    deadline = time.monotonic() + 180
    while not (output.exists() and "step" in output.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == [] and read_results(place.out / "results.json") == []


def test_cells_are_chosen_by_case_and_seed(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    with pytest.raises(UserError, match="--seed 7 is not in the plan; use 0"):
        run_study(STUDY, place, Part("small", seeds=[7]), lambda line: None)
    with pytest.raises(UserError, match="--case x is not in the plan"):
        run_study(STUDY, place, Part("small", cases=["x"]), lambda line: None)


def test_no_cell_begins_that_would_end_too_late(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), list[str]()
    results = run_study(STUDY, place, Part("small", minutes=0.0), log.append)
    assert results.all == [] and log[-1] == (
        "stopped before none, seed 0, which would end after --minutes 0; start again to continue"
    )
    assert "0 of 2 runs of the plan are finished. Not measured yet: seed 0 (2 runs)." in place.page.read_text()


def test_trap_T93_results_that_are_damaged_or_of_another_plan_are_not_used(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.out.mkdir(parents=True)
    path = place.out / "results.json"
    content = '{"format": 1, "cells": [{"case": "", "arm": "none", "seed": 0, "digest": "x", "values": {}}]}'
    path.write_text(content)
    with pytest.raises(UserError, match="has 1 result of another plan or preset, which would be lost"):
        run_study(STUDY, place, Part("small", minutes=0.0), lambda line: None)
    assert path.read_text() == content and len(read_results(path)) == 1
    for content, words in (("{", "cannot be read"), ('{"format": 2}', "has format=2"), ('{"format": 1}', "cannot be")):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            run_study(STUDY, place, Part("small", minutes=0.0), lambda line: None)
