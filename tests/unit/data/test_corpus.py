"""`prepare`: the split, the files, what is tokenized again and what is not, and concurrent processes."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.corpus import Corpus, open_tokenized, prepare
from dist_moe.data.split import in_validation
from dist_moe.errors import DataError
from tests.disk import run_on_disk

TEXTS = {f"work {number}": f"Work {number}: the quick brown fox. " * (number % 5 + 1) for number in range(60)}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Write a .jsonl file of 60 named documents in two domains, and an empty one."""
    lines = [
        {"name": name, "text": text, "domain": f"domain {index % 2}"}
        for index, (name, text) in enumerate(TEXTS.items())
    ]
    lines.insert(7, {"name": "empty", "text": ""})
    path = tmp_path / "works.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def _texts(corpus: Corpus, decode: object) -> list[str]:
    bounds = corpus.starts_N1
    assert all(corpus.tokens[end - 1] == corpus.end_id for end in bounds[1:])
    assert (corpus.tokens == corpus.end_id).sum() == len(bounds) - 1
    return [decode(corpus.tokens[a : b - 1]) for a, b in pairwise(bounds)]  # type: ignore[operator]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_its_split_once(source: str, tmp_path: Path, tokenizer: str) -> None:
    tokenized = prepare([source], tokenizer, 300, 0.3, tmp_path)  # type: ignore[arg-type]
    decode = tokenized.tokenizer.decode
    validation_set = {name for name in TEXTS if in_validation(name, 0.3)}
    assert _texts(tokenized.train, decode) == [text for name, text in TEXTS.items() if name not in validation_set]
    assert _texts(tokenized.validation, decode) == [text for name, text in TEXTS.items() if name in validation_set]
    assert tokenized.train.domains == ("domain 0", "domain 1")
    domains = [int(name.split()[1]) % 2 for name in TEXTS if name not in validation_set]
    assert tokenized.train.domains_N.tolist() == domains
    for corpus in (tokenized.train, tokenized.validation):
        assert corpus.text_bytes == tokenized.tokenizer.token_bytes_V[corpus.tokens].sum()
        assert corpus.tokens.dtype == np.uint16
        assert all(isinstance(each, np.memmap) for each in (corpus.tokens, corpus.starts_N1, corpus.domains_N))
    listed = (tokenized.folder / "validation.documents.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in listed} == validation_set


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_text_that_is_not_divided_is_whole_and_in_order(source: str, tmp_path: Path, tokenizer: str) -> None:
    tokenized = prepare([source], tokenizer, 300, None, tmp_path)  # type: ignore[arg-type]
    assert tokenized.train is tokenized.validation or tokenized.train.starts_N1 is tokenized.validation.starts_N1
    assert _texts(tokenized.validation, tokenized.tokenizer.decode) == list(TEXTS.values())
    assert tokenized.validation.text_bytes == sum(len(text) for text in TEXTS.values())
    assert isinstance(tokenized.validation.tokens, np.memmap) and len(tokenized.files) == 3
    again = prepare([source], tokenizer, 300, None, tmp_path)  # type: ignore[arg-type]
    assert again.fingerprint == tokenized.fingerprint != prepare([source], "bytes", 300, 0.3, tmp_path).fingerprint


def test_one_document_that_is_not_divided_stays_one(tmp_path: Path) -> None:
    for text in ("abc", "some words " * 20_000):
        (tmp_path / "a.txt").write_text(text)
        tokenized = prepare([str(tmp_path / "a.txt")], "bytes", 0, None, tmp_path)
        assert _texts(tokenized.validation, tokenized.tokenizer.decode) == [text]
        assert tokenized.notes == ()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="leave the text without a token to predict"):
        prepare([str(tmp_path / "a.txt")], "bytes", 0, None, tmp_path)


def test_split_does_not_depend_on_order_or_other_documents(source: str, tmp_path: Path) -> None:
    whole = {name for name in TEXTS if in_validation(name, 0.1)}
    wider = {name for name in TEXTS if in_validation(name, 0.3)}
    assert whole < wider
    assert 0.07 < np.mean([in_validation(str(number), 0.1) for number in range(5000)]) < 0.13


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    lines = [
        {
            "name": str(number),
            "text": "zyzzyva " * 50 if in_validation(str(number), 0.2) else "quixotic " * 50,
        }
        for number in range(40)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = prepare([str(path)], "bpe", 300, 0.2, tmp_path).tokenizer
    assert len(tokenizer.encode(" quixotic")) == 1
    assert len(tokenizer.encode(" zyzzyva")) == 8


def test_cached_tokens_are_opened_not_made_again(source: str, tmp_path: Path) -> None:
    first = prepare([source], "bytes", 0, 0.3, tmp_path)
    inode = first.folder.stat().st_ino
    again = prepare([source], "bytes", 0, 0.3, tmp_path)
    assert (again.fingerprint, again.folder.stat().st_ino) == (first.fingerprint, inode)
    assert open_tokenized(first.folder).records == first.records
    other = prepare([source], "bytes", 0, 0.4, tmp_path)
    bpe = prepare([source], "bpe", 300, 0.3, tmp_path)
    assert len({first.fingerprint, other.fingerprint, bpe.fingerprint}) == 3
    assert bpe.fingerprint != prepare([source], "bpe", 290, 0.3, tmp_path).fingerprint
    with Path(source).open("a") as handle:
        handle.write('{"text": "one more"}\n')
    assert prepare([source], "bytes", 0, 0.3, tmp_path).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["train.tokens", "validation.starts", "manifest.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_tokens_are_made_again(source: str, tmp_path: Path, name: str, damage: str) -> None:
    first = prepare([source], "bytes", 0, 0.3, tmp_path)
    expected = np.array(first.train.tokens)
    path = first.folder / name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with pytest.raises(DataError, match="damaged"):
        open_tokenized(first.folder)
    again = prepare([source], "bytes", 0, 0.3, tmp_path)
    np.testing.assert_array_equal(again.train.tokens, expected)
    assert again.tokenizer.decode(again.tokenizer.encode("x")) == "x"


def test_leftover_of_a_killed_process_is_removed(source: str, tmp_path: Path) -> None:
    first = prepare([source], "bytes", 0, 0.3, tmp_path)
    partial = first.folder.with_name(first.fingerprint + ".partial")
    first.folder.rename(partial)
    (partial / "train.tokens").write_bytes(b"half")
    again = prepare([source], "bytes", 0, 0.3, tmp_path)
    assert len(again.train.tokens) == again.train.starts_N1[-1] > 100
    assert not partial.exists()


def test_error_while_preparing_leaves_nothing_that_opens(source: str, tmp_path: Path) -> None:
    with Path(source).open("a") as handle:
        handle.write("not json\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"works\.jsonl:62"):
            prepare([source], "bytes", 0, 0.3, tmp_path)
    assert not [path for path in (tmp_path / "tokens").iterdir() if (path / "manifest.json").exists()]


@pytest.mark.parametrize(("fraction", "split", "remedy"), [(0.99, "train", "lower"), (0.01, "validation", "raise")])
def test_empty_split_is_refused(tmp_path: Path, fraction: float, split: str, remedy: str) -> None:
    (tmp_path / "only.txt").write_text("one document alone")
    with pytest.raises(DataError, match=f"{split} split empty.*; {remedy} data.validation_fraction"):
        prepare([str(tmp_path / "only.txt")], "bytes", 0, fraction, tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_fraction_out_of_range_is_refused(source: str, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        prepare([source], "bytes", 0, fraction, tmp_path)


def test_concurrent_processes_get_the_same_tokens(source: str, tmp_path: Path) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from dist_moe.data.corpus import prepare
        print("ready", flush=True)
        sys.stdin.readline()
        made = prepare([sys.argv[1]], "bpe", 300, 0.3, Path(sys.argv[2]))
        print(made.folder.stat().st_ino, made.fingerprint, int(made.train.tokens.astype(int).sum()))
    """
    command = [sys.executable, "-c", program, source, str(tmp_path / "cache")]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": Path(__file__).parents[3],
    }
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers = {worker.communicate(timeout=60)[0] for worker in workers}
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(answers) == 1
    assert len(answers.pop().split()) == 3


@pytest.mark.parametrize("name", ["stdlib-code", "shakespeare"])
def test_built_in_sources_split_fairly(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name == "shakespeare":
        (tmp_path / "sources").mkdir()
        shutil.copy(request.getfixturevalue("archive"), tmp_path / "sources")
    tokenized = prepare([name], "bytes", 0, 0.1, tmp_path)
    validation_set, trained = tokenized.validation.text_bytes, tokenized.train.text_bytes
    assert 0.03 < validation_set / (validation_set + trained) < 0.25
    assert len(tokenized.validation.starts_N1) - 1 >= 3


READ_ONLY = """if True:
    import sys
    from pathlib import Path
    from dist_moe.data.corpus import prepare
    from dist_moe.errors import DataError
    from tests.disk import set_read_only
    cache, source = Path(sys.argv[1]), sys.argv[2]
    first = prepare([source], "bytes", 0, 0.3, cache)
    for lock in (cache / "tokens").glob("*.lock"):
        lock.unlink()
    assert set_read_only(cache, True)
    assert prepare([source], "bytes", 0, 0.3, cache).fingerprint == first.fingerprint
    try:
        prepare([source], "bytes", 0, 0.4, cache)
    except DataError as error:
        print(error)
"""


def test_tokens_in_a_read_only_cache_are_opened_and_others_refused_in_one_line(source: str, tmp_path: Path) -> None:
    told = run_on_disk(tmp_path / "disk", "8m", READ_ONLY, source)
    assert told.startswith(f"the cache folder {tmp_path}/disk cannot be written (Read-only file system: ")
    assert told.endswith("; set DIST_MOE_CACHE to a folder that this user can write\n") and told.count("\n") == 1
