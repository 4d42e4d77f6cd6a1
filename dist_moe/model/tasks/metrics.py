"""Measures of predicted classes and values, as pure functions over the examples of a whole validation set.

Shapes: N examples, C classes.
"""

import math
from collections.abc import Mapping

import numpy as np


def classification_metrics(labels_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> dict[str, float]:
    """Return accuracy, macro-F1 and Matthews correlation.

    Args:
        labels_N: Indices of the classes.
        predicted_N: Indices of the predicted ones.
        classes: How many there are (C).
    """
    counts_CC = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts_CC, (labels_N.astype(np.int64), predicted_N.astype(np.int64)), 1)
    return {
        "accuracy": float(np.trace(counts_CC) / max(1, counts_CC.sum())),
        "macro_f1": macro_f1(counts_CC),
        "matthews": matthews(counts_CC),
    }


def regression_metrics(labels_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Return the correlations of Pearson and Spearman between values and predictions."""
    return {
        "pearson": pearson(labels_N, predicted_N),
        "spearman": pearson(average_ranks(labels_N), average_ranks(predicted_N)),
    }


def macro_f1(counts_CC: np.ndarray) -> float:
    """Return the mean over the classes of 2 TP / (2 TP + FP + FN), which is 0 for a class that is never right.

    Args:
        counts_CC: Examples by class (row) and predicted class (column).
    """
    hits_C, of_C = np.diag(counts_CC), counts_CC.sum(axis=0) + counts_CC.sum(axis=1)
    return float(np.mean(2 * hits_C / np.maximum(1, of_C)))


def matthews(counts_CC: np.ndarray) -> float:
    """Return Matthews correlation for C classes (Gorodkin 2004); 0 where one class alone occurs or is predicted.

    Args:
        counts_CC: Examples by class (row) and predicted class (column).
    """
    true_C, predicted_C = (counts_CC.sum(axis=axis).astype(np.float64) for axis in (1, 0))
    total = float(counts_CC.sum())
    covariance = float(np.trace(counts_CC)) * total - float(true_C @ predicted_C)
    spread = (total**2 - float(true_C @ true_C)) * (total**2 - float(predicted_C @ predicted_C))
    return covariance / math.sqrt(spread) if spread > 0 else 0.0


def pearson(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Return the correlation of two sets of numbers; NaN where one of them is constant, or has a NaN."""
    first, second = first_N - first_N.mean(), second_N - second_N.mean()
    spread = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / spread if spread > 0 else math.nan


def average_ranks(values_N: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 0, float64 [N]; equal values share the mean of their ranks."""
    _, index_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = (ends - (counts + 1) / 2)[index_N]
    return means


def task_metrics(labels_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> Mapping[str, float]:
    """Return the metrics of a classification, or, with no classes, of a regression."""
    if not classes:
        return regression_metrics(labels_N, predicted_N)
    return classification_metrics(labels_N, predicted_N, classes)
