"""Questions, and sentences that answer them or do not: the task of QNLI, made of questions on paragraphs.

The questions are those of SQuAD and of its shifted test sets (Miller et al. 2020, arXiv 2004.14444). A positive pair
has the first sentence in which an answer begins, a negative one the sentence without an answer that shares the most
words with the question. Split by paragraph.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_moe.data.labeled.example import Example
from dist_moe.data.packages.bigbench import SQUAD_FILES

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
WORD = re.compile(r"\w+")
ANSWERED, UNANSWERED = "entailment", "not_entailment"


def read_qnli_like(folder: Path) -> Iterator[Example]:
    """Yield a positive and a negative pair of each question whose paragraph has both."""
    for name in SQUAD_FILES:
        for article in json.loads((folder / name).read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                yield from _of_paragraph(paragraph)


def _of_paragraph(paragraph: dict[str, Any]) -> Iterator[Example]:
    context = paragraph["context"]
    key = hashlib.sha256(context.encode()).hexdigest()[:16]
    spans = sentence_spans(context)
    for question in paragraph["qas"]:
        starts = [answer["answer_start"] for answer in question["answers"]]
        answered = [any(begin <= start < end for start in starts) for begin, end in spans]
        if not any(answered) or all(answered):
            continue
        text, words = question["question"].strip(), set(WORD.findall(question["question"].lower()))
        sentences = [context[begin:end].strip() for begin, end in spans]
        others = [sentence for sentence, has_answer in zip(sentences, answered, strict=True) if not has_answer]
        closest = max(others, key=lambda sentence: len(words & set(WORD.findall(sentence.lower()))))
        yield Example(key, text, sentences[answered.index(True)], ANSWERED)
        yield Example(key, text, closest, UNANSWERED)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return where each sentence of a text begins and ends; every character is in one."""
    edges = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [(begin, end) for begin, end in pairwise(edges) if text[begin:end].strip()]
