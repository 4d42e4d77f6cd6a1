"""Datasets that Hugging Face `datasets` saved to disk, in files of its layout."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dist_moe.data.labeled.arrow import arrow_files
from dist_moe.data.labeled.sources import fetch_labeled, read_labeled
from dist_moe.errors import DataError


def save(folder: Path, columns: dict[str, list[Any]], names: list[str] | None = None, files: int = 2) -> None:
    """Write a dataset as `Dataset.save_to_disk` does: streams of record batches, their list, and the features."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    listed = []
    for number in range(files):
        name = f"data-{number:05d}-of-{files:05d}.arrow"
        part = table.slice(number * len(table) // files, len(table) // files)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
        listed.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, "_split": folder.name}))
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "float64", "_type": "Value"}
    features = {"label": label, "text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def save_splits(folder: Path) -> None:
    """Write a dataset of three splits."""
    texts = [f"text {number}" for number in range(6)]
    save(folder / "train", {"sentence": texts, "label": [0, 1] * 3, "idx": list(range(6))}, ["bad", "good"])
    save(folder / "validation", {"sentence": ["held out"], "label": [1], "idx": [0]}, ["bad", "good"], files=1)
    save(folder / "test", {"sentence": ["hidden"], "label": [-1], "idx": [0]}, ["bad", "good"], files=1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))


def test_splits_and_names_of_classes_are_those_of_the_dataset(tmp_path: Path) -> None:
    save_splits(tmp_path / "data")
    examples = list(read_labeled(str(tmp_path / "data"), tmp_path))
    assert [each.split for each in examples] == ["train"] * 6 + ["validation"]
    assert [(each.text, each.label) for each in examples[:2]] == [("text 0", "bad"), ("text 1", "good")]
    assert (examples[-1].text, examples[-1].text_pair, examples[-1].label) == ("held out", None, "good")
    (record,) = fetch_labeled([str(tmp_path / "data")], tmp_path)
    assert record.bytes == sum(path.stat().st_size for _, path in arrow_files(tmp_path / "data"))


def test_a_single_dataset_has_no_splits_and_numbers_stay(tmp_path: Path) -> None:
    save(tmp_path / "data", {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.5, 2.0]})
    first, second = read_labeled(str(tmp_path / "data"), tmp_path)
    assert (first.text, first.text_pair, first.label, first.split) == ("a", "c", "0.5", None)
    assert second.label == "2.0"


def test_an_unlabeled_row_is_left_out_and_an_unknown_label_refused(tmp_path: Path) -> None:
    save(tmp_path / "one", {"text": ["a", "b"], "label": [0, -1]}, ["x", "y"], files=1)
    assert [each.text for each in read_labeled(str(tmp_path / "one"), tmp_path)] == ["a"]
    save(tmp_path / "two", {"text": ["a", "b"], "label": [0, 2]}, ["x", "y"], files=1)
    with pytest.raises(DataError, match="row 2 has the label 2, and its dataset_info"):
        list(read_labeled(str(tmp_path / "two"), tmp_path))


def test_the_names_are_those_of_the_column_of_the_labels(tmp_path: Path) -> None:
    save(tmp_path / "data", {"text": ["a", "b"], "label": [0, 1]}, ["bad", "good"], files=1)
    path = tmp_path / "data/dataset_info.json"
    label = json.loads(path.read_text())["features"]["label"]
    other = {"names": ["news", "films"], "_type": "ClassLabel"}
    path.write_text(json.dumps({"features": {"domain": other, "label": label}}))
    assert [each.label for each in read_labeled(str(tmp_path / "data"), tmp_path)] == ["bad", "good"]
    path.write_text(json.dumps({"features": {"domain": other}}))
    assert [each.label for each in read_labeled(str(tmp_path / "data"), tmp_path)] == ["0", "1"]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    save(tmp_path / "data", {"text": ["a", "qqqq"], "label": [0, 1]}, files=1)
    (file,) = (path for _, path in arrow_files(tmp_path / "data"))
    file.write_bytes(file.read_bytes().replace(b"qqqq", b"q\xff\xffq"))
    with pytest.raises(DataError, match=r"cannot be read .*give a folder that `save_to_disk`"):
        list(read_labeled(str(tmp_path / "data"), tmp_path))


@pytest.mark.parametrize("damage", ["cut", "missing", "outside", "no train"])
def test_a_damaged_dataset_is_named(tmp_path: Path, damage: str) -> None:
    save_splits(tmp_path / "data")
    file = tmp_path / "data/train/data-00000-of-00002.arrow"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing":
        file.unlink()
    elif damage == "outside":
        (tmp_path / "data/train/state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    else:
        (tmp_path / "data/dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match="give a folder that `save_to_disk`"):
        list(read_labeled(str(tmp_path / "data"), tmp_path))
