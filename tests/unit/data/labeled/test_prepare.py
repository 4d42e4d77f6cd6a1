"""`prepare_labeled`: splits, labels, what is tokenized again, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.config.sections.task import TaskConfig
from dist_moe.data.labeled.example import Example
from dist_moe.data.labeled.prepare import OWN_SPLITS, LabeledData, divide, place_of, prepare_labeled
from dist_moe.data.labeled.stream import ExampleStream
from dist_moe.data.split import in_validation
from dist_moe.data.stream import Rows
from dist_moe.errors import DataError

CLASSES = TaskConfig(kind="classification")
COUNT = 60


def write(folder: Path, labels: list[Any] | None = None) -> str:
    """Write examples of two or three classes, of different lengths."""
    path = folder / "examples.jsonl"
    labels = labels or [["bad", "good", "so-so"][number % 3] for number in range(COUNT)]
    rows = [
        {"text": f"{number} " * (1 + number % 7), "label": label, "key": f"film {number // 2}"}
        for number, label in enumerate(labels)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def prepared(
    source: str, cache: Path, task: TaskConfig = CLASSES, length: int = 16, fraction: float | None = 0.2
) -> LabeledData:
    return prepare_labeled([source], task, "bytes", 300, length, fraction, cache)


def test_every_example_is_in_the_split_of_its_key_once(tmp_path: Path) -> None:
    data = prepared(write(tmp_path), tmp_path)
    held_out = [number for number in range(COUNT) if in_validation(f"film {number // 2}", 0.2)]
    texts_of = [f"{number} " * (1 + number % 7) for number in range(COUNT)]
    held_out.sort(key=lambda number: place_of(Example(f"film {number // 2}", texts_of[number], None, "")))
    assert data.labels == ("bad", "good", "so-so")
    assert data.validation.labels_N.tolist() == [number % 3 for number in held_out]
    assert data.train.count == COUNT - len(held_out)
    texts = [
        data.tokenizer.decode(data.validation.tokens[start:end])
        for start, end in zip(data.validation.starts_N1, data.validation.starts_N1[1:], strict=False)
    ]
    assert texts == [(f"{number} " * (1 + number % 7))[:15] for number in held_out]
    cut = sum(2 * (1 + number % 7) + (number > 9) * (1 + number % 7) > 15 for number in range(COUNT))
    assert sum(int(note.split()[0]) for note in data.notes) == cut


def test_sources_with_splits_of_their_own_say_that_the_fraction_does_not_apply(tmp_path: Path) -> None:
    for name, count in (("train.tsv", 9), ("dev.tsv", 3)):
        rows = "".join(f"text {number}\t{number % 2}\n" for number in range(count))
        (tmp_path / name).write_text(f"sentence\tlabel\n{rows}")
    data = prepared(str(tmp_path), tmp_path / "cache")
    assert (data.train.count, data.validation.count) == (9, 3)
    assert data.notes == (OWN_SPLITS,) and OWN_SPLITS not in prepared(write(tmp_path), tmp_path / "cache").notes


def test_the_first_held_out_examples_are_of_all_classes_where_a_source_is_sorted() -> None:
    examples = [Example(str(number), "", None, str(number // 100)) for number in range(300)]
    first = divide(examples, 0.5)["validation"][:30]
    assert {each.label for each in first} == {"0", "1", "2"}
    assert divide(examples, None)["all"] != examples


def test_the_first_held_out_examples_are_of_many_keys_where_keys_have_many_examples() -> None:
    examples = [Example(f"page {number // 100}", str(number), None, "a", "validation") for number in range(900)]
    examples.append(Example("other", "", None, "a", "train"))
    first = divide(examples, 0.5)["validation"][:90]
    assert len({each.key for each in first}) == 9


def test_tokens_are_made_again_exactly_where_they_would_differ(tmp_path: Path) -> None:
    source = write(tmp_path)
    first = prepared(source, tmp_path)
    assert prepared(source, tmp_path).fingerprint == first.fingerprint
    others = [
        prepared(source, tmp_path, length=8),
        prepared(source, tmp_path, TaskConfig(kind="classification", labels=["so-so", "good", "bad"])),
        prepared(source, tmp_path, fraction=0.3),
        prepared(source, tmp_path, fraction=None),
    ]
    assert others[1].train.labels_N[:3].tolist() == [2 - label for label in first.train.labels_N[:3]]
    write(tmp_path, ["x", "y"] * 30)
    others.append(prepared(source, tmp_path))
    assert len({each.fingerprint for each in [first, *others]}) == 6


def test_the_labels_of_a_regression_are_numbers(tmp_path: Path) -> None:
    values = [number / 4 - 3 for number in range(COUNT)]
    data = prepared(write(tmp_path, values), tmp_path, TaskConfig(kind="regression"))
    assert data.labels == ()
    assert sorted([*data.train.labels_N, *data.validation.labels_N]) == values


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (["one"] * COUNT, CLASSES, "have one label for all examples, 'one'"),
        (["a", "b"] * 30, TaskConfig(kind="classification", labels=["a", "c"]), "does not have the label 'b'"),
        (["a", "b"] * 30, TaskConfig(kind="classification", labels=["a", "b", "c"]), "no training example of 'c'"),
        (["a", "b"] * 30, TaskConfig(kind="regression"), "'a' .*is not a finite number; set task.kind=classification"),
        (["nan"] * COUNT, TaskConfig(kind="regression"), "which is not a finite number"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[Any], task: TaskConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(write(tmp_path, labels), tmp_path, task)


def test_an_evaluation_may_lack_a_class_of_the_model(tmp_path: Path) -> None:
    task = TaskConfig(kind="classification", labels=["a", "b", "c"])
    for labels in (["a", "b"] * 30, ["c"] * COUNT):
        data = prepared(write(tmp_path, labels), tmp_path, task, fraction=None)
        assert data.labels == ("a", "b", "c")
        assert {data.labels[int(label)] for label in data.validation.labels_N} == set(labels)


@pytest.mark.parametrize("fraction", [0.2, None])
def test_files_without_an_example_are_refused(tmp_path: Path, fraction: float | None) -> None:
    path = tmp_path / "none.csv"
    path.write_text("text,label\n")
    for task in (CLASSES, TaskConfig(kind="regression")):
        with pytest.raises(DataError, match=r"^data\.sources have no example; give files with examples$"):
            prepared(str(path), tmp_path, task, fraction=fraction)


def test_an_empty_split_and_a_length_without_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves the validation split without an example, of 60"):
        prepared(write(tmp_path), tmp_path, fraction=1e-9)
    with pytest.raises(DataError, match="sequence_length=1 has no room"):
        prepared(write(tmp_path), tmp_path, length=1)


@pytest.fixture
def stream(tmp_path: Path) -> ExampleStream:
    return ExampleStream(prepared(write(tmp_path), tmp_path).train, seed=3)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own(stream: ExampleStream) -> None:
    count = stream.rows_per_epoch
    epochs = [[stream.documents(Rows(epoch * count + row, 1))[0] for row in range(count)] for epoch in range(3)]
    assert all(sorted(order) == list(range(count)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.documents(Rows(count - 2, 4)) == sorted({*epochs[0][-2:], *epochs[1][:2]})


def test_any_division_of_the_rows_gives_the_same_examples(stream: ExampleStream) -> None:
    whole, parts = stream.batch(40, 12), [stream.batch(40 + 3 * part, 3) for part in range(4)]
    assert whole.labels_B.tolist() == [label for part in parts for label in part.labels_B.tolist()]
    rows = [row[mask].tolist() for row, mask in zip(whole.tokens_BS, whole.mask_BS, strict=True)]
    assert rows == [
        row[mask].tolist() for part in parts for row, mask in zip(part.tokens_BS, part.mask_BS, strict=True)
    ]
    assert whole.mask_BS.any(dim=0).all(), "padded to the longest row, and no further"
    assert int(whole.token_count) == sum(map(len, rows)) and int(whole.label_count) == 12


def test_tokens_are_counted_without_padding(stream: ExampleStream) -> None:
    for row in (0, 7, stream.rows_per_epoch, stream.rows_per_epoch + 5):
        read = sum(int(stream.batch(each, 1).token_count) for each in range(row))
        assert stream.tokens_before(row) == read


def test_rows_past_the_end_are_padding(stream: ExampleStream) -> None:
    count = stream.rows_per_epoch
    batch = stream.rows_in_file_order(count - 1, 3)
    assert batch.mask_BS.any(dim=1).tolist() == [True, False, False]
    assert int(batch.label_count) == 1 and batch.labels_B[1:].tolist() == [0, 0]
    assert np.array_equal(stream.rows_in_file_order(0, count).labels_B.numpy(), stream.labels_N)
    with pytest.raises(ValueError, match="rows=0"):
        stream.batch(0, 0)
