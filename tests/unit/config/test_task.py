"""The section `task`: what does not go together, and what has no effect."""

from pathlib import Path

import pytest

from dist_moe.config import load_config
from dist_moe.config.checks.task import task_violations
from dist_moe.config.checks.unused import unused_notices
from dist_moe.train.data_check import data_violations

ROOT = Path(__file__).parents[3]
CLASSIFY = "task.kind=classification"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ([CLASSIFY, "task.labels=[a,b]", "task.class_weights=[1.0,2.0]"], []),
        ([CLASSIFY, "task.class_weights=balanced"], []),
        ([CLASSIFY, "task.labels=[a,b,a]"], ["task.labels=['a', 'b', 'a'] repeats 'a'; give each class once"]),
        ([CLASSIFY, "task.class_weights=[1.0]"], ["has no task.labels, whose order it follows"]),
        ([CLASSIFY, "task.labels=[a,b]", "task.class_weights=[1.0]"], ["has 1 weight for 2 classes"]),
        (
            ["task.kind=regression", "task.labels=[a,b]", "task.class_weights=balanced"],
            ["task.labels=['a', 'b'] is of classes", "task.class_weights=balanced is of classes"],
        ),
    ],
)
def test_fields_that_do_not_go_together(overrides: list[str], messages: list[str]) -> None:
    found = task_violations(load_config(ROOT / "configs/debug.yaml", overrides))
    assert len(found) == len(messages)
    for violation, message in zip(found, messages, strict=True):
        assert message in str(violation).replace('"', "'")


def test_fields_without_effect_are_noticed() -> None:
    language = load_config(ROOT / "configs/debug.yaml", ["task.pooling=last", "task.class_weights=balanced"])
    notices = unused_notices(language)
    assert any("task.pooling=last has no effect with task.kind=language_model" in notice for notice in notices)
    assert any("task.class_weights=balanced has no effect" in notice for notice in notices)
    classifying = load_config(
        ROOT / "configs/debug.yaml", [CLASSIFY, "model.cross_entropy=chunked", "task.pooling=last"]
    )
    (notice,) = (each for each in unused_notices(classifying) if "task" in each)
    assert notice.startswith("model.cross_entropy=chunked has no effect with task.kind=classification")


@pytest.mark.parametrize(
    ("content", "overrides", "key", "message"),
    [
        (None, [], "data.sources", "has no labels; give rotten_tomatoes"),
        ('{"text": "x", "label": "a"}\n' * 3, [], "data.validation_fraction", "without an example"),
        ('{"words": "x"}\n', [], "data.sources", "has no text among 'words'"),
        (None, ["data.sources=[bbc_news]"], "", ""),
        ("rows", ["task.labels=['0','2']"], "task.labels", "does not have the label '1' of an example"),
        ("rows", ["task.kind=regression"], "", ""),
        ("rows", ["task.kind=language_model"], "data.sources", ""),
    ],
)
def test_what_a_configuration_names_is_read_before_a_run(
    tmp_path: Path, content: str | None, overrides: list[str], key: str, message: str
) -> None:
    path = tmp_path / "examples.csv"
    if content == "rows":
        content = "text,label\n" + "".join(f"text {number},{number % 2}\n" for number in range(60))
    if content is not None:
        path = path.with_suffix(".csv" if content.startswith("text") else ".jsonl")
        path.write_text(content)
        overrides = [f"data.sources=[{path}]", *overrides]
    config = load_config(ROOT / "configs/debug.yaml", [CLASSIFY, f"run.dir={tmp_path}/run", *overrides])
    found = data_violations(config)
    assert [violation.key for violation in found] == ([key] if key else [])
    assert not key or message in str(found[0])
