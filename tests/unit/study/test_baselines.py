"""Tests of the baselines of classification, on labeled texts of which the right accuracy is known."""

import json
from pathlib import Path

import pytest

from dist_moe.data.split import in_validation
from dist_moe.study.baselines import measure_baselines

FRACTION = 0.2


def write_examples(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a file of labeled examples."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_words_that_decide_the_class_are_learned_and_the_majority_is_that_of_training(tmp_path: Path) -> None:
    rows = [
        {
            "key": f"k{number}",
            "text": f"the film is {'good' if number % 4 else 'bad'}, says number {number}",
            "label": label,
        }
        for number in range(400)
        for label in ["fresh" if number % 4 else "rotten"]
    ]
    write_examples(tmp_path / "reviews.jsonl", rows)
    found = measure_baselines([str(tmp_path / "reviews.jsonl")], FRACTION, few=100, cache=tmp_path)
    held_out = [row for row in rows if in_validation(row["key"], FRACTION)]
    assert (found.examples, found.held_out, found.few) == (400 - len(held_out), len(held_out), 100)
    assert found.majority == pytest.approx(sum(row["label"] == "fresh" for row in held_out) / len(held_out))
    assert found.linear == 1.0 and found.linear_few > 0.95


def test_the_second_text_of_a_pair_is_told_from_the_first(tmp_path: Path) -> None:
    rows = [
        {"key": f"k{number}", "text": first, "text_pair": second, "label": "yes" if first == "red" else "no"}
        for number, (first, second) in enumerate([("red", "blue"), ("blue", "red")] * 200)
    ]
    write_examples(tmp_path / "pairs.jsonl", rows)
    assert measure_baselines([str(tmp_path / "pairs.jsonl")], FRACTION, few=50, cache=tmp_path).linear == 1.0
