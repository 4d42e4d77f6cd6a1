"""Metrics of classes and values, on counts made by hand and against definitions."""

import math

import numpy as np
import pytest

from dist_moe.model.tasks.metrics import (
    average_ranks,
    classification_metrics,
    matthews,
    regression_metrics,
    task_metrics,
)


def test_trap_T19_metrics_of_a_table_made_by_hand() -> None:
    labels_N = np.array([0] * 6 + [1] * 4)
    predicted_N = np.array([0] * 5 + [1] + [1] * 1 + [0] * 3)
    found = classification_metrics(labels_N, predicted_N, 2)
    # Of class 0: 5 right, 3 too many, 1 missed; of class 1: 1 right, 1 too many, 3 missed.
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["macro_f1"] == pytest.approx((10 / 14 + 2 / 6) / 2)
    assert found["matthews"] == pytest.approx((5 * 1 - 3 * 1) / math.sqrt(8 * 6 * 2 * 4))


def test_matthews_of_many_classes_is_the_correlation_of_indicators() -> None:
    generator = np.random.default_rng(0)
    counts_CC = generator.integers(0, 9, (4, 4))
    pairs = [(a, b) for a in range(4) for b in range(4) for _ in range(counts_CC[a, b])]
    first, second = (np.eye(4)[[pair[side] for pair in pairs]] for side in (0, 1))
    first, second = first - first.mean(0), second - second.mean(0)
    expected = (first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum())
    assert matthews(counts_CC) == pytest.approx(expected)
    assert matthews(np.array([[3, 0], [2, 0]])) == 0.0, "one class alone is predicted"


def test_a_class_that_is_never_predicted_counts_as_0() -> None:
    found = classification_metrics(np.array([0, 0, 1]), np.array([0, 0, 0]), 3)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 0 + 0) / 3)


def test_correlations_of_values() -> None:
    values_N = np.array([1.0, 2.0, 3.0, 4.0])
    found = regression_metrics(values_N, np.array([1.0, 4.0, 9.0, 16.0]))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(values_N, [1, 4, 9, 16])[0, 1])
    assert math.isnan(regression_metrics(values_N, np.ones(4))["pearson"])
    assert average_ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert set(task_metrics(values_N, values_N, 0)) == {"pearson", "spearman"}
