"""Classifiers without a network, by which a study of classification is judged."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_moe.config.sections.data import DataConfig
from dist_moe.data.cache import cache_folder
from dist_moe.data.labeled.example import Example
from dist_moe.data.labeled.prepare import divide
from dist_moe.data.labeled.sources import fetch_labeled, read_labeled
from dist_moe.errors import needs_folder
from dist_moe.files import write_atomically
from dist_moe.study.grid.page import Log
from dist_moe.study.grid.plan import Cell

SEED = 0
# Rare pairs of words cost memory and add nothing.
MOST_FEATURES = 200_000


class Baseline(NamedTuple):
    """The accuracies of the baselines on the held-out examples of a task.

    Attributes:
        examples: Training examples.
        held_out: Held-out examples.
        majority: Of the most frequent class of the training examples.
        linear: Of a linear classifier on all training examples.
        linear_few: Of the same on as many of them as a run of the study reads.
        few: Their number.
    """

    examples: int
    held_out: int
    majority: float
    linear: float
    linear_few: float
    few: int


def measure_baselines(sources: Sequence[str], fraction: float, few: int, cache: Path) -> Baseline:
    """Train and measure the baselines of labeled sources, on the split of a run.

    The linear classifier is logistic regression on TF-IDF of words and pairs of words; of a pair of texts, those of the
    second are other features than those of the first.

    Args:
        sources: As `data.sources`.
        fraction: As `data.validation_fraction`.
        few: Number of training examples of the second linear classifier, drawn at random.
        cache: The folder for fetched sources.

    Raises:
        DataError: A source cannot be fetched or read.
    """
    fetch_labeled(sources, cache)
    parts = divide([example for source in sources for example in read_labeled(source, cache)], fraction)
    train, test = parts["train"], parts["validation"]
    common = Counter(example.label for example in train).most_common(1)[0][0]
    drawn = np.random.Generator(np.random.PCG64(SEED)).permutation(len(train))[:few]
    return Baseline(
        examples=len(train),
        held_out=len(test),
        majority=sum(example.label == common for example in test) / len(test),
        linear=_linear_accuracy(train, test),
        linear_few=_linear_accuracy([train[index] for index in drawn], test),
        few=len(drawn),
    )


def write_baselines(path: Path, cells: Sequence[Cell], log: Log) -> None:
    """Measure the baselines of each case of a study, and write them as JSON.

    Raises:
        DataError: As `measure_baselines`.
        RunFolderError: The file cannot be written.
    """
    found = {}
    for case, cell in {cell.case: cell for cell in cells}.items():
        log(f"baselines of {case}")
        data, train = cell.settings["data"], cell.settings["train"]
        fraction = data.get("validation_fraction", DataConfig.model_fields["validation_fraction"].default)
        few = train["steps"] * train["global_batch_size"]
        found[case] = measure_baselines(data["sources"], fraction, few, cache_folder())._asdict()
    with needs_folder(path, "--out", "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, indent=1) + "\n")


def _linear_accuracy(train: Sequence[Example], test: Sequence[Example]) -> float:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    matrices = []
    for texts in (
        [[e.text for e in part] for part in (train, test)],
        [[e.text_pair for e in part] for part in (train, test)],
    ):
        if all(text is not None for part in texts for text in part):
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_FEATURES)
            matrices.append((vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1])))
    known, unseen = (hstack(columns).tocsr() for columns in zip(*matrices, strict=True))
    classifier = LogisticRegression(max_iter=300, C=4.0)
    classifier.fit(known, [example.label for example in train])
    return float(classifier.score(unseen, [example.label for example in test]))
