"""Sources by name: the standard library, local files, and names that are refused."""

import json
import pickle
from pathlib import Path

import pytest

from dist_moe.data.cache import cache_folder
from dist_moe.data.sources import fetch_sources, read_documents
from dist_moe.errors import DataError


def test_stdlib_is_code_without_tests_or_packages(tmp_path: Path) -> None:
    documents = list(read_documents("stdlib-code", tmp_path))
    names = [document.name for document in documents]
    assert "asyncio/events.py" in names
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idle_test"}
    assert 8_000_000 < sum(len(document.text) for document in documents) < 20_000_000
    assert not list(tmp_path.iterdir())


def test_records_differ_exactly_when_content_or_names_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    pattern = str(tmp_path / "*.txt")
    first = fetch_sources([pattern, "stdlib-code"], tmp_path)
    assert fetch_sources([pattern, "stdlib-code"], tmp_path) == first
    assert (first[0].name, first[0].bytes) == (pattern, 3)
    (tmp_path / "a.txt").write_text("two")
    changed = fetch_sources([pattern, "stdlib-code"], tmp_path)
    assert changed[0].sha256 != first[0].sha256
    assert changed[1] == first[1]
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert fetch_sources([pattern], tmp_path)[0].sha256 != changed[0].sha256


def test_text_files_are_documents_named_below_the_glob(tmp_path: Path) -> None:
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "b.txt").write_bytes("Zwei\r\nZeilen ü".encode())
    (tmp_path / "books" / "deep" / "a.txt").write_text("\ufeffmarked")
    (tmp_path / "books" / "c.md").write_text("of another kind")
    documents = list(read_documents(str(tmp_path / "books" / "**" / "*.txt"), tmp_path))
    assert [(each.domain, each.name, each.text) for each in documents] == [
        ("books", "b.txt", "Zwei\r\nZeilen ü"),
        ("deep", "deep/a.txt", "marked"),
    ]


def test_a_text_file_given_by_its_path_is_a_domain_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    (document,) = read_documents(str(tmp_path / "b.txt"), tmp_path)
    assert (document.domain, document.name, document.text) == ("b", "b.txt", "text")


def test_path_with_glob_characters_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    (document,) = read_documents(str(tmp_path / "a[1].txt"), tmp_path)
    assert document.name == "a[1].txt"


def test_jsonl_takes_names_and_domains_or_makes_them(tmp_path: Path) -> None:
    lines = [
        {"text": "one", "name": "n1", "domain": "d"},
        {"text": "two"},
        {"text": "two"},
        {"text": "\U0001f600"},
    ]
    path = tmp_path / "news.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second, third, fourth = read_documents(str(path), tmp_path)
    assert (first.domain, first.name, first.text) == ("d", "n1", "one")
    assert second.domain == "news"
    assert second == third
    assert len({first.name, second.name, fourth.name}) == 3
    assert fourth.text == "\U0001f600"


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON in UTF-8"),
        (b'["text"]', "not an object with the field 'text'"),
        (b'{"body": "x"}', "not an object with the field 'text'"),
        (b'{"text": 3}', "field 'text' that is not a string"),
        (b'{"text": "x", "name": null}', "field 'name' that is not a string"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_bad_line_is_named_with_file_and_number(tmp_path: Path, bad: bytes, rule: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + bad + b"\n")
    documents = read_documents(str(path), tmp_path)
    assert next(documents).text == "good"
    with pytest.raises(DataError, match=rule) as caught:
        next(documents)
    assert caught.value.value == f"{path}:3"
    assert caught.value.remedy


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not UTF-8"):
        print([document.text for document in read_documents(str(tmp_path / "a.txt"), tmp_path)])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no source"),
        (["stdlib-code", "stdlib-code"], "repeats stdlib-code"),
        (["shakespear"], "did you mean 'shakespeare'"),
        (["bbc_news"], "has labeled examples, which are not a text to model; set task.kind=classification"),
        (["no/such/*.txt"], "matches no .txt or .jsonl file"),
        (["http://x.y/z.txt"], "is a URL, which is not downloaded; download the file first, and give its path"),
    ],
)
def test_unknown_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch_sources(names, tmp_path)


def test_folder_is_refused_with_a_glob(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch_sources([str(tmp_path)], tmp_path)
    assert str(tmp_path / "**" / "*.txt") in caught.value.remedy


def test_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(DataError("value", "breaks a rule", "fix it")))
    assert (str(error), error.rule) == ("value breaks a rule; fix it", "breaks a rule")


def test_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    assert cache_folder({"DIST_MOE_CACHE": str(tmp_path)}) == tmp_path
    assert cache_folder({}) == Path.home() / ".cache" / "dist_moe"
