"""Tests of the page: its numbers are those of the files, and nothing of the files becomes markup."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_moe.errors import UserError
from dist_moe.observe.record import RunRecorder
from dist_moe.observe.report import load_maps
from dist_moe.observe.report.page import make_page, render, write_page
from dist_moe.observe.report.runs import read_runs
from tests.unit.observe.report.sample_runs import EVEN, STEPS, Markup, change_json, hostile_run, write_run
from tests.unit.observe.samples import evaluation_sample, step_sample


def page_of(*folders: Path) -> Markup:
    return Markup(render(make_page(read_runs(folders))))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(page: Markup, chart: str, line: str) -> list[list[float]]:
    (found,) = [each["points"] for each in page.data["charts"][chart]["lines"] if each["name"] == line]
    return found


def test_the_first_screen_has_loss_balance_and_speed_of_the_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page, validation = page_of(folder), lines_of(folder)[-1]
    cards = page.text[: page.text.index("All results")]
    assert "run\nfinished, step 30 of 30" in cards
    assert f"Validation loss\n{validation['validation_loss']:.4f}\nnats/token" in cards
    assert f"{validation['max_vio_global']:.3f}\nfloor {validation['max_vio_global_floor']:.3f}" in cards
    assert f"has {1 + validation['max_vio_global']:.2f} times the mean load over the held-out text" in cards
    assert "Speed\n12,346\ntokens/s\nOn 2 workers" in cards


def test_the_curves_have_the_values_of_the_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page, steps = page_of(folder), [line for line in lines_of(folder) if line["event"] == "step"]
    for chart, field, digits in (("max-vio", "max_vio", 1e-12), ("dead-experts", "dead_experts", 0)):
        assert curve(page, chart, "value") == [[step["step"], pytest.approx(step[field], rel=digits)] for step in steps]
        floors = [[step["step"], pytest.approx(step[f"{field}_floor"])] for step in steps]
        assert curve(page, chart, "floor") == floors
    assert curve(page, "loss", "training") == [[step, 4.0 - step / 20] for step in STEPS]
    assert curve(page, "loss", "validation") == [[30, 2.0]]
    assert curve(page, "bias", "largest") == [[step, 0.5] for step in STEPS]
    paths = [attributes for tag, attributes in page.elements if tag == "path" and "M1 5" not in str(attributes["d"])]
    assert len(paths) > 12 and all(str(attributes["d"]).startswith("M") for attributes in paths)


def test_a_heat_map_has_the_load_of_each_expert_and_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page, steps = page_of(folder), [line for line in lines_of(folder) if line["event"] == "step"]
    maps = [attributes for tag, attributes in page.elements if tag == "image"][2:]  # after the scale and the overview
    assert len(maps) == 2 and page.data["runs"]["0"] == {"steps": list(STEPS), "single": True}
    ratios = np.array([np.nan if ratio is None else ratio for ratio in page.data["ratios"]])
    for layer, attributes in enumerate(maps):
        content = base64.b64decode(str(attributes["href"]).removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            colors, indices = np.asarray(image.convert("RGB")), np.asarray(image)
        assert indices.shape == (4, 4)
        assert (colors == np.array(page.data["palette"])[indices]).all()
        load_SE = np.array([step["load"][layer] for step in steps], dtype=float)
        expected = (load_SE / load_SE.mean(axis=1, keepdims=True)).T
        assert ratios[indices] == pytest.approx(expected, rel=0.02)


def test_a_comparison_has_a_column_and_a_color_for_each_run_and_says_what_differs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", ["balance={policy: none}", "run.seed=3"])]
    page = page_of(*folders)
    assert "comparison of 2 runs" in page.text and "a · b" in page.text
    assert "balance.policy\nloss_free\nnone" in page.text and "run.seed\n0\n3" in page.text
    assert "cannot" not in page.text, "all results can be compared"
    names = {line["name"]: line["style"] for line in page.data["charts"]["max-vio"]["lines"]}
    assert names == {"a": "run-0", "b": "run-1", "a, floor": "run-0 floor", "b, floor": "run-1 floor"}
    assert "loss-over-time" in page.data["charts"]
    assert sorted(page.data["runs"]) == ["0", "1"]


def test_runs_that_cannot_be_compared_are_said_to_be_so(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a"),
        write_run(
            tmp_path / "b", ["data.sequence_length=32"], layout={"corpus": "fedc", "workers": 4}, evaluated=False
        ),
    ]
    text = page_of(*folders).text
    assert "Not all of these results can be compared" in text
    for reason in (
        "b is not finished, so the results are of different steps",
        "their texts or tokenizers differ (0123456789ab and fedc), so the losses are not comparable",
        "their sequence lengths differ (64 and 32), so the losses are not comparable",
        "their numbers of workers differ (2 and 4), so the speeds are not comparable",
    ):
        assert reason in text


def test_trap_T90_nothing_of_a_run_becomes_markup_or_a_script(tmp_path: Path) -> None:
    one = hostile_run(tmp_path / "<img src=x onerror=alert(1)>&'\"")
    for folders in ([one], [one, write_run(tmp_path / "b")]):
        page = page_of(*folders)
        assert not {tag for tag, _ in page.elements} & {"img", "b", "iframe", "link", "object"}
        assert [attributes for tag, attributes in page.elements if tag == "script"] == [
            {"type": "application/json", "id": "data"},
            {},
        ]
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert "<img src=x onerror=alert(1)>" in page.text and "<script>alert(1)</script>" in page.text
        assert "{{7654321*1234567}}" in page.text, "no text is a template"
        assert str(7654321 * 1234567) not in page.text, "no text is a template"
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", page.text)


def test_trap_T90_the_page_lets_no_other_script_run_and_loads_nothing(tmp_path: Path) -> None:
    text = render(make_page(read_runs([write_run(tmp_path / "run")])))
    page = Markup(text)
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style, _, script = page.scripts
    for content, directive in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    addresses = [value for _, each in page.elements for name, value in each.items() if name in ("src", "href")]
    assert addresses and all(str(address).startswith("data:image/png;base64,") for address in addresses)
    assert not re.findall(r"(?:https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", "").replace("// ", ""))
    assert not [1 for _, attributes in page.elements if "style" in attributes], "the policy would drop it"


def test_sixty_layers_stay_a_few_megabytes_and_are_below_one_line(tmp_path: Path) -> None:
    layers, experts, steps = 60, 64, 300
    random = np.random.default_rng(0)
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({}, "", layout={})
        for step in range(1, steps + 1):
            load = random.multinomial(4096, random.dirichlet(np.full(experts, 5.0)), size=layers)
            recorder.write({"event": "step", "step": step, "loss": 3.0, "load": load.tolist()})
    size = write_page(tmp_path / "report.html", read_runs([tmp_path]))
    text = (tmp_path / "report.html").read_text()
    assert size == len(text.encode()) < 4_000_000
    page = Markup(text)
    maps = [attributes for tag, attributes in page.elements if attributes.get("class") == "map"]
    assert len(maps) == 1 + 1 + layers
    assert "A column is the sum of several logged steps" in page.text
    details = [attributes for tag, attributes in page.elements if tag == "details"]
    assert details and "Load of each expert, 60 layers" in page.text
    assert all("open" not in attributes for attributes in details)


def test_many_experts_are_cut_to_the_least_balanced_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, experts = 12, 16
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({}, "", layout={})
        for step in range(1, 33):
            load = [[1 + (layer == 7) * (expert == 3) * 9 for expert in range(experts)] for layer in range(layers)]
            recorder.write({"event": "step", "step": step, "loss": 3.0, "load": load})
    monkeypatch.setattr(load_maps, "MOST_CELLS", 5 * experts * 32 // 2)
    page = make_page(read_runs([tmp_path]))
    titles = [load_map.title for load_map in page.maps[-1].maps]
    assert titles == ["layer 0", "layer 1", "layer 2", "layer 3", "layer 7"]
    assert "The experts of the 5 least balanced layers of 12 are shown, to keep the page small." in page.map_notes


def test_a_run_in_progress_without_an_evaluation_has_its_training_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluated=False)
    text = page_of(folder).text
    assert "in progress or interrupted, logged until step 30 of 30" in text
    assert "Training loss\n2.5000\nnats/token\nNot evaluated on held-out text yet." in text
    assert "Balance: MaxVio\n0.000" in text


def test_a_dense_model_has_no_load(tmp_path: Path) -> None:
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({}, "", layout={})
        recorder.write(step_sample(loads=()).as_dict())
        recorder.write(evaluation_sample(loads=()).as_dict())
    page = page_of(tmp_path)
    assert (
        "Balance" not in page.text and "Load over the steps" not in page.text and "max-vio" not in page.data["charts"]
    )


def test_metrics_of_another_task_are_shown_whatever_they_are_called(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with RunRecorder(folder) as recorder:
        for step, accuracy in ((30, 0.75), (60, 0.8125)):
            recorder.write({**evaluation_sample(step=step).as_dict(), "accuracy": accuracy, "macro_f1": 0.5})
    page = page_of(folder)
    assert (
        "Accuracy\n0.8125\nmacro f1: 0.5000. Loss on held-out text: 2.0000; training: 2.5000 at the end." in page.text
    )
    assert "accuracy\n0.8125" in page.text and "macro f1\n0.5000" in page.text
    assert curve(page, "metric-0", "accuracy") == [[30, 0.75], [60, 0.8125]]


def test_the_file_replaces_an_earlier_one_and_a_path_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "run")])
    out = tmp_path / "new/report.html"
    for _ in range(2):
        assert write_page(out, runs) == out.stat().st_size
    with pytest.raises(UserError, match=r"--out=.* cannot be written"):
        write_page(tmp_path / "run/run.json/report.html", runs)


def test_an_even_load_is_drawn_in_the_color_of_the_mean(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", loads=(EVEN,) * 4))
    image = [attributes for tag, attributes in page.elements if tag == "image"][-1]
    content = base64.b64decode(str(image["href"]).partition(",")[2])
    with Image.open(io.BytesIO(content)) as opened:
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - 247).max() <= 3


def test_loads_of_a_run_with_target_shares_are_relative_to_these(tmp_path: Path) -> None:
    loads = (([40, 20, 10, 10], [40, 20, 10, 10]),) * 4
    page = page_of(write_run(tmp_path / "run", ["balance.shares=[0.5, 0.25, 0.125, 0.125]"], loads=loads))
    image = [attributes for tag, attributes in page.elements if tag == "image"][-1]
    with Image.open(io.BytesIO(base64.b64decode(str(image["href"]).partition(",")[2]))) as opened:
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - 247).max() <= 3
    assert page.data["reference"] == "mean or target" and "relative to the target of each expert" in page.text
    assert "least / target\nmost / target" in page.text and "times its target load" in page.text


@pytest.mark.parametrize("shares", ["much", [1, 2], {"0": "all"}, [[]]])
def test_damaged_shares_leave_the_mean(tmp_path: Path, shares: object) -> None:
    folder = write_run(tmp_path / "run", loads=(EVEN,) * 4)
    description = json.loads((folder / "run.json").read_text())
    description["config"]["balance"]["shares"] = shares
    change_json(folder / "run.json", config=description["config"])
    assert "least / mean\nmost / mean" in page_of(folder).text
