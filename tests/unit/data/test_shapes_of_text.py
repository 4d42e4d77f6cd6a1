"""Texts of any shape: one long document, one long word, single characters, deep JSON, and files that are not read."""

import json
import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.corpus import TokenizedData, prepare
from dist_moe.data.files import READ_BYTES, Document, FileText, local_files
from dist_moe.data.sources import fetch_sources, read_documents, repeated_names
from dist_moe.data.split import LARGEST_BLOCK, SMALLEST_BLOCK, choose_split, in_validation
from dist_moe.data.tokenizer import LONGEST_PIECE, cut, cut_pieces, train_bpe
from dist_moe.errors import DataError

ROOT = Path(__file__).parents[3]


def _words(count: int) -> str:
    choose = random.Random(0).choices
    return " ".join("".join(choose("abcdefgh", k=5)) for _ in range(count))


def _all_text(data: TokenizedData) -> tuple[str, str]:
    """The text of both splits, without end tokens."""
    decode = data.tokenizer.decode
    return decode(data.train.tokens), decode(data.validation.tokens)


@pytest.mark.parametrize("fraction", [0.1, 0.01, 0.9])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_one_long_document_is_held_out_by_blocks(tmp_path: Path, tokenizer: str, fraction: float) -> None:
    text = _words(12_000)
    (tmp_path / "input.txt").write_text(text)
    data = prepare([str(tmp_path / "input.txt")], tokenizer, 300, fraction, tmp_path)  # type: ignore[arg-type]
    train, validation = _all_text(data)
    assert sorted(train + validation) == sorted(text)
    assert 0.01 <= len(validation) / len(text) == pytest.approx(fraction, abs=0.03)
    (note,) = data.notes
    assert "whole documents (1) would leave one of the splits empty" in note and "blocks of about" in note
    listed = (data.folder / "train.documents.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in listed]
    assert names[0] in ("input.txt#0", "input.txt#1") and len(names) == len(set(names))
    assert prepare([str(tmp_path / "input.txt")], tokenizer, 300, fraction, tmp_path).notes == (note,)  # type: ignore[arg-type]


def _unspaced(letters: str, length: int) -> str:
    return "".join(random.Random(0).choices(letters, k=length))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (_unspaced("天地玄黃宇宙洪荒", 200_000), 4_000),
        (_unspaced("ACGT", 20_000), 400),
        (_unspaced(string.ascii_letters, 1_500_000), LARGEST_BLOCK),
        (_words(9_000) + " " + _unspaced("ACGT", 46_000) + " " + _words(1_000), 2_120),
    ],
)
def test_a_text_without_white_space_is_held_out_by_blocks_of_a_fixed_length(
    tmp_path: Path, text: str, size: int
) -> None:
    document = Document("domain", "name", (text,))
    split = choose_split(lambda: iter([document]), 0.1)
    assert split.size == size
    parts = [(part.held_out, part.document.text) for part in split.parts(iter([document]))]
    assert "".join(part for _, part in parts) == text
    held_out = [len(part) for is_held_out, part in parts if is_held_out]
    assert max(held_out) <= 2 * size
    assert sum(held_out) / len(text) == pytest.approx(0.1, abs=0.05)
    assert split.blocks >= len(text) // (2 * size)


def test_the_least_text_that_can_be_divided() -> None:
    def split_of(length: int) -> int:
        return choose_split(lambda: iter([Document("domain", "name", ("a" * length,))]), 0.1).blocks

    assert split_of(2 * SMALLEST_BLOCK + 1) == 2
    with pytest.raises(DataError, match=r"split empty, and the text of 512 characters is too short to be divided"):
        split_of(2 * SMALLEST_BLOCK)
    with pytest.raises(DataError, match=r"split empty, and the text of 1 character is too short to be divided"):
        split_of(1)


def test_documents_of_one_byte_do_not_fill_a_split(tmp_path: Path) -> None:
    names = [str(number) for number in range(200)]
    held_out = [name for name in names if in_validation(name, 0.1)]
    lines = [{"name": name, "text": "a" if name in held_out else _words(60)} for name in names]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = prepare([str(tmp_path / "a.jsonl")], "bytes", 0, 0.1, tmp_path)
    assert len(data.notes) == 1
    assert data.validation.text_bytes == pytest.approx(0.1 * data.train.text_bytes, rel=0.3)
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace('"a"', '"\u00e9"'))
    two_bytes = prepare([str(tmp_path / "b.jsonl")], "bytes", 0, 0.1, tmp_path)
    assert (two_bytes.notes, len(two_bytes.validation.domains_N)) == ((), len(held_out)), "two tokens, one predicted"


def test_whole_documents_are_held_out_where_both_splits_get_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"name": str(n), "text": "x" * 9}) + "\n" for n in range(60)))
    split = choose_split(lambda: read_documents(str(tmp_path / "a.jsonl"), tmp_path), 0.1)
    assert (split.size, split.note) == (0, "")


def test_a_text_without_white_space_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    text = "é日a" * (READ_BYTES // 2)
    (tmp_path / "a.txt").write_text("\ufeff" + text)
    pieces = list(FileText(tmp_path / "a.txt"))
    assert "".join(pieces) == text and max(map(len, pieces)) <= READ_BYTES
    cuts = list(cut_pieces(pieces, 1000))
    assert cuts == list(cut(text, 1000))
    assert "".join(cuts) == text and max(map(len, cuts)) == LONGEST_PIECE


@pytest.mark.parametrize("at", [0, 7, READ_BYTES - 1, READ_BYTES, READ_BYTES + 5])
def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path: Path, at: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * at + b"\xe9" + b"y" * 10)
    with pytest.raises(DataError, match=rf"a\.txt: byte {at} is not UTF-8"):
        list(FileText(tmp_path / "a.txt"))


@pytest.mark.parametrize("letters", ["a", "0", " ", "-", string.ascii_lowercase])
def test_training_on_one_long_word_takes_no_longer_than_on_words(letters: str) -> None:
    choose = random.Random(0).choices

    def seconds(text: str) -> float:
        start = time.process_time()
        train_bpe(iter([text]), 300)
        return time.process_time() - start

    length = 200_000
    word = "".join(choose(letters, k=length))
    words = " ".join("".join(choose(string.ascii_lowercase, k=6)) for _ in range(length // 7))
    assert seconds(word) < 10 * seconds(words) + 1


def test_a_large_text_is_tokenized_in_little_memory(tmp_path: Path) -> None:
    """By a process that reports its peak: 24 MB without a line break."""
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(24):
            file.write("abcdefgh" * 125_000)
    program = """if True:
        import resource, sys
        from pathlib import Path
        from dist_moe.data.corpus import prepare
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        data = prepare([sys.argv[1]], "bytes", 0, 0.1, Path(sys.argv[2]))
        print(len(data.train.tokens) + len(data.validation.tokens), peak() - before)
    """
    argv = [sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    tokens, megabytes = subprocess.check_output(argv, cwd=ROOT, text=True).split()
    assert int(tokens) >= 24_000_000
    # Mapped pages of the tokens count too; one copy of them in int64 would take 192 MB.
    assert float(megabytes) < 150


def test_documents_of_one_character_are_refused_before_training(tmp_path: Path) -> None:
    lines = [json.dumps({"name": str(number), "text": "a"}) + "\n" for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=r"without a token to predict.*; give longer documents"):
        prepare([str(tmp_path / "a.jsonl")], "bytes", 0, 0.3, tmp_path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_a_source_without_text_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    (tmp_path / "more.txt").write_text(_words(9000))
    sources = [str(tmp_path / "more.txt"), str(tmp_path / "empty.jsonl")]
    with pytest.raises(DataError, match=r"empty\.jsonl' (is empty|has no text); give a source with text"):
        prepare(sources, "bytes", 0, 0.1, tmp_path)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": ' + "[" * 20_000 + "]" * 20_000 + "}", "is JSON that nests too deeply"),
        ('{"text": "a", "text": "b"}', "gives the key 'text' twice"),
    ],
)
def test_a_line_that_is_not_plain_json_is_refused(tmp_path: Path, line: str, rule: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:1 .*{rule}"):
        list(read_documents(str(tmp_path / "a.jsonl"), tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """By a user without permission, since root has it."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    program = """if True:
        import os, sys
        from pathlib import Path
        from dist_moe.data.sources import fetch_sources
        from dist_moe.errors import DataError
        if os.geteuid() == 0:
            os.chdir(Path(sys.argv[1]).parent)
            os.chmod(".", 0o755)
            os.setuid(65534)
        try:
            fetch_sources(["a.txt"], Path("."))
        except DataError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", program, str(tmp_path / "a.txt")]
    told = subprocess.check_output(argv, cwd=tmp_path, text=True, env=environment)
    assert told == "a.txt cannot be read (Permission denied); make it readable for this user, or leave it out\n"


CLOSED = """if True:
    import os, sys
    from dist_moe.data.files import local_files
    from dist_moe.errors import DataError
    for name, mode in (("closed", 0), ("listed", 0o444), (".", 0o755)):
        os.chmod(name, mode)
    if os.geteuid() == 0:
        os.setuid(65534)
    for pattern in sys.argv[1:]:
        try:
            print(pattern, [name for name, _ in local_files(pattern)])
        except DataError as error:
            print(error)
"""


def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """By a user without permission, since root has it."""
    for folder in ("open/inner", "closed", "listed"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("text")
    refused = {
        **{"**/*.txt": "./closed/.", "*/*.txt": "closed/.", "*/a.txt": "closed/a.txt", "**": "closed/."},
        **{"closed/*.txt": "closed/.", "closed/a.txt": "closed/a.txt", "closed/**/*.txt": "closed/."},
        **{"l*/*.txt": "listed/.", "listed/*.txt": "listed/.", "listed/a.txt": "listed/a.txt"},
    }
    accepted = {"open/**/*.txt": ["inner/a.txt"], "open/inner/[a]*.txt": ["a.txt"], "o*/none/*.txt": [], "no/*.txt": []}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", CLOSED, *refused, *accepted]
    try:
        told = subprocess.check_output(argv, cwd=tmp_path, text=True, env=environment).splitlines()
    finally:
        for name in ("closed", "listed"):
            (tmp_path / name).chmod(0o755)
    assert told[len(refused) :] == [f"{pattern} {names}" for pattern, names in accepted.items()]
    for pattern, line in zip(refused, told, strict=False):
        assert line.startswith(f"data source '{pattern}' has a folder that cannot be read (Permission denied: "), line
        assert line.endswith("; give this user permission to read it, or a pattern without it")
        assert "closed" in line or "listed" in line


def test_a_folder_of_the_standard_library_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.py").write_text("a = 1\n")
    program = """if True:
        import os, sysconfig
        from dist_moe.data.sources import source_files
        from dist_moe.errors import DataError
        sysconfig.get_paths = lambda: {"stdlib": "."}
        for name, mode in (("closed", 0), (".", 0o755)):
            os.chmod(name, mode)
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            source_files("stdlib-code")
        except DataError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True, env=environment)
    (tmp_path / "closed").chmod(0o755)
    assert told.startswith(
        "data source 'stdlib-code' has a folder that cannot be read (Permission denied: ./closed); make"
    )


def test_many_files_are_looked_at_in_linear_time(tmp_path: Path) -> None:
    """Minutes where each file is looked up in a list of the others."""
    for number in range(12_000):
        (tmp_path / f"{number}.csv").touch()
    (tmp_path / "a.txt").write_text("text")
    names = [str(number) for number in range(20_000)]
    start = time.process_time()
    with pytest.raises(DataError, match=r"0\.csv, .* and 11997 more, which is not \.txt or \.jsonl"):
        local_files(str(tmp_path / "*"))
    assert repeated_names([*names, "5", "5", "2"]) == ["2", "5"]
    assert time.process_time() - start < 15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.jsonl.gz", r"matches .*b\.jsonl\.gz, which is not \.txt or \.jsonl; unpack it with gunzip"),
        ("b.parquet", r"b\.parquet, which is not .*; write its texts as one JSON object per line"),
        ("README.md", r"README\.md, which is not .*; (leave it out|rename a text to \.txt)"),
    ],
)
@pytest.mark.parametrize("pattern", ["*", "name itself"])
def test_a_file_of_another_kind_is_not_left_out_in_silence(
    tmp_path: Path, name: str, message: str, pattern: str
) -> None:
    for each in ("a.txt", name):
        (tmp_path / each).write_text("text")
    with pytest.raises(DataError, match=message):
        fetch_sources([str(tmp_path / (name if pattern == "name itself" else pattern))], tmp_path)


def test_a_dead_link_and_a_pipe_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    for pattern in ("*.txt", "a.txt"):
        with pytest.raises(DataError, match=r"a\.txt, a link to a file that does not exist; remove the link"):
            fetch_sources([str(tmp_path / pattern)], tmp_path)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt, which is not a regular file"):
        fetch_sources([str(tmp_path / "a.txt")], tmp_path)


def test_a_file_under_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "one"}\n')
    for sources in (["a.jsonl", "./a.jsonl"], ["a.jsonl", "*.jsonl"]):
        with pytest.raises(DataError, match=r"are one file, whose text would count twice; give it once"):
            fetch_sources(sources, tmp_path)
    for make in (os.symlink, os.link):
        make("a.jsonl", "b.jsonl")
        with pytest.raises(DataError, match=r"a\.jsonl and .*b\.jsonl are one file"):
            fetch_sources(["*.jsonl"], tmp_path)
        Path("b.jsonl").unlink()


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]" / "[x]"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("text")
    assert local_files(str(folder / "*.txt")) == [("a.txt", folder / "a.txt")]
    assert local_files(str(tmp_path / "data[1]" / "**" / "*.txt")) == [("[x]/a.txt", folder / "a.txt")]
    assert local_files(f"{'x' * 300}/*.txt") == local_files(f"{tmp_path}/*/{'x' * 300}") == []
    (tmp_path / "d1").mkdir()
    (tmp_path / "d1" / "b.txt").write_text("text")
    assert local_files(str(tmp_path / "d[12]" / "*.txt")) == [("d1/b.txt", tmp_path / "d1" / "b.txt")]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / os.fsdecode(b"caf\xe9%d.txt" % number)).write_text(f"text {number}")
    data = prepare([str(tmp_path / "*.txt")], "bytes", 0, 0.3, tmp_path / "cache")
    assert len(data.train.starts_N1) + len(data.validation.starts_N1) == 32
    assert np.array(data.train.tokens).max() == 256
