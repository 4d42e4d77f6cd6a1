"""Labeled examples in local files: jsonl, csv, tsv, and folders of GLUE tasks."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.data import files
from dist_moe.data.labeled.example import Example, sorted_labels
from dist_moe.data.labeled.sources import fetch_labeled, read_labeled
from dist_moe.errors import DataError

GLUE = {
    "CoLA": 'gj04\t1\t\tThey drank.\ngj04\t0\t*\tHe "rang\n',
    "SST-2": 'sentence\tlabel\nThey drank.\t1\nHe "rang\t0\n',
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tThey drank.\tThey did.\n",
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tThey drank.\tThey did.\t1\n4\t5\tbroken\n"),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012\t1\tnone\tnone\tThey drank.\tThey did.\t3.800\n"
    ),
    "MNLI": (
        "index\tpromptID\tsentence1_binary_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t( a )\tThey drank.\tThey did.\tneutral\tentailment\n0\t1\t( a )\tb\tc\tneutral\t-\n"
    ),
    "QNLI": "index\tquestion\tsentence\tlabel\n0\tThey drank.\tThey did.\tentailment\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tThey drank.\tThey did.\tentailment\n",
}
LABELS = {"MNLI": "entailment", "QNLI": "entailment", "RTE": "entailment", "STS-B": "3.800"}


@pytest.mark.parametrize("task", list(GLUE))
def test_the_layout_of_each_glue_task_is_read_with_its_own_splits(tmp_path: Path, task: str) -> None:
    dev = "dev_matched.tsv" if task == "MNLI" else "dev.tsv"
    for name in ("train.tsv", dev, "test.tsv"):
        (tmp_path / name).write_text(GLUE[task])
    examples = list(read_labeled(str(tmp_path), tmp_path))
    assert [each.split for each in examples] == sorted(each.split or "" for each in examples)
    assert {each.split for each in examples} == {"train", "validation"}
    first, single = examples[0], task in ("CoLA", "SST-2")
    assert (first.text, first.text_pair) == ("They drank.", None if single else "They did.")
    assert first.label == LABELS.get(task, "1")
    assert len(examples) == (4 if single else 2), "a broken line, and one without a label, are passed over"
    if single:
        assert (examples[1].text, examples[1].label) == ('He "rang', "0")
    (record,) = fetch_labeled([str(tmp_path)], tmp_path)
    assert record.bytes == 2 * len(GLUE[task])


def test_a_carriage_return_inside_a_text_of_glue_is_part_of_it(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_bytes(b"sentence\tlabel\r\nThey\rdrank.\t1\r\nThey ate.\t0\n")
    examples = list(read_labeled(str(tmp_path), tmp_path))
    assert [(each.text, each.label) for each in examples] == 2 * [("They\rdrank.", "1"), ("They ate.", "0")]


def test_a_line_with_other_fields_than_the_first_is_refused(tmp_path: Path) -> None:
    """A second text that only some lines have would be lost."""
    rows = [{"text": "a", "label": "x"}, {"text": "b", "text_pair": "c", "label": "y"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"a.jsonl:2 has 'text', 'text_pair' and 'label', and the first"):
        list(read_labeled(str(path), tmp_path))
    path.write_text("\n".join(json.dumps({**row, "text_pair": "c", "more": n}) for n, row in enumerate(rows)))
    assert [each.text_pair for each in read_labeled(str(path), tmp_path)] == ["c", "c"]


def test_a_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'long ' * 40_000},x\n")
    (example,) = read_labeled(str(path), tmp_path)
    assert len(example.text) == 200_000


def test_a_source_that_holds_nothing_out_has_no_splits(tmp_path: Path) -> None:
    for rows, splits in (("", {None}), ("They ate.\t0\n", {"train", "validation"})):
        (tmp_path / "train.tsv").write_text("sentence\tlabel\nThey drank.\t1\n")
        (tmp_path / "dev.tsv").write_text(f"sentence\tlabel\n{rows}")
        assert {each.split for each in read_labeled(str(tmp_path), tmp_path)} == splits
    (tmp_path / "dev.tsv").unlink()
    assert [each.split for each in read_labeled(str(tmp_path), tmp_path)] == [None]


def test_names_of_equal_numbers_are_in_one_order() -> None:
    names = ["2", "+1", "01", "1"]
    for order in itertools.permutations(names):
        assert sorted_labels(dict.fromkeys(order)) == ["+1", "01", "1", "2"]
    assert sorted_labels(["b", "10", "9"]) == ["10", "9", "b"]


def test_jsonl_and_tables_give_the_same_examples(tmp_path: Path) -> None:
    rows = [('good, "fine"', "yes", "a"), ("bad\nwords", "", "b")]
    lines = [{"text": text, "text_pair": pair, "label": label, "key": label} for text, pair, label in rows]
    (tmp_path / "all.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        table = "\ufeff" + comma.join(["text", "text_pair", "label", "key"]) + "\r\n"
        for text, pair, label in rows:
            quoted = text.replace('"', '""')
            table += comma.join([f'"{quoted}"', f'"{pair}"', label, label]) + "\r\n"
        (tmp_path / f"all{suffix}").write_text(table, newline="")
    expected = [Example(label, text, pair, label) for text, pair, label in rows]
    for suffix in (".jsonl", ".csv", ".tsv"):
        assert list(read_labeled(str(tmp_path / f"all{suffix}"), tmp_path)) == expected, suffix


def test_equal_texts_have_one_key_and_numbers_are_labels(tmp_path: Path) -> None:
    lines = [{"text": "one", "label": 1}, {"text": "one", "label": True}, {"text": "two", "label": 0.5}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second, third = read_labeled(str(tmp_path / "a.jsonl"), tmp_path)
    assert first.key == second.key != third.key
    assert [each.label for each in (first, second, third)] == ["1", "True", "0.5"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "cut', "not valid JSON"),
        ('["text"]', "is not an object"),
        ('{"text": 3, "label": 1}', "field 'text' that is not a text"),
        ('{"text": "x", "label": null}', "neither a text nor a number"),
        ('{"text": "x", "label": " "}', "neither a text nor a number"),
        ('{"text": "\\ud800", "label": 1}', "half of a surrogate pair"),
        ('{"text": "x", "label": "\\ud800"}', "'label' with half of a surrogate pair"),
        ('{"text": "x", "label": 1, "key": 3}', "'key' that is not a text"),
        ('{"text": "x", "label": 1, "key": "\\udfff"}', "'key' with half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good", "label": 1}}\n\n{line}\n')
    with pytest.raises(DataError, match=rule) as caught:
        list(read_labeled(str(path), tmp_path))
    assert caught.value.value == f"{path}:3"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("words,class\nx,1\n", "has no text among 'class' and 'words'"),
        ("text,kind\nx,1\n", "has no label among 'kind' and 'text'"),
        ('text,label\n"open,1\n', "cannot be read as a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, content: str, rule: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rule):
        list(read_labeled(str(tmp_path / "a.csv"), tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlib-code", "has no labels; give rotten_tomatoes"),
        ("rotten_tomatos", "did you mean 'rotten_tomatoes'"),
        ("no/such/*.csv", "matches no file"),
        ("{folder}/a.txt", "which is not .jsonl, .csv or .tsv"),
    ],
)
def test_what_is_no_labeled_source_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        fetch_labeled([name.format(folder=tmp_path)], tmp_path)
    with pytest.raises(DataError, match="repeats bbc_news"):
        fetch_labeled(["bbc_news", "bbc_news"], tmp_path)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda folder: os.mkfifo(folder / "b.jsonl"), "which is not a regular file"),
        (lambda folder: (folder / "b.jsonl").symlink_to("none.jsonl"), "a link to a file that does not exist"),
        (lambda folder: (folder / "b.jsonl").hardlink_to(folder / "a.jsonl"), "are one file, whose text would count"),
    ],
)
def test_pipes_lost_links_and_a_file_of_two_names_are_refused(
    tmp_path: Path, make: Callable[[Path], None], rule: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n')
    make(tmp_path)
    with pytest.raises(DataError, match=rule):
        list(read_labeled(f"{tmp_path}/*.jsonl", tmp_path))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("[" * 100_000, "a.jsonl:2 is JSON that nests too deeply"),
        (json.dumps({"text": "x" * 900, "label": 1}), "a.jsonl:2 is longer than 800 bytes"),
    ],
)
def test_a_line_that_would_take_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, rule: str
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 800 if "longer" in rule else 1 << 26)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=rule):
        list(read_labeled(f"{tmp_path}/a.jsonl", tmp_path))


def test_a_file_of_two_sources_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x", "label": 1}\n')
    with pytest.raises(DataError, match="are one file, whose text would count twice"):
        fetch_labeled([f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"], tmp_path)
    assert len(fetch_labeled([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], tmp_path)) == 2
