"""Tests of the load over the steps: no count is lost when columns are added, and memory is bounded."""

import itertools

import numpy as np
import pytest

from dist_moe.observe.pictures.over_steps import LoadOverSteps


def history(steps: int, max_columns: int = 256) -> LoadOverSteps:
    """Return the load of steps 10, 20, ...: expert 0 of two layers gets as many tokens as the number of the step."""
    result = LoadOverSteps(max_columns)
    for number in range(1, steps + 1):
        result.add(10 * number, [[number, 10], [number, 20, 30]])
    return result


def test_each_logged_step_is_a_column_while_there_is_room() -> None:
    found = history(3)
    assert found.steps == [10, 20, 30] and found.layers == 2
    assert found.ratio_EC(0).tolist() == pytest.approx(
        np.array([[2 * n / (n + 10) for n in (1, 2, 3)], [20 / (n + 10) for n in (1, 2, 3)]])
    )
    assert found.ratio_EC(1).shape == (3, 3)


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8, 9, 16, 17, 1000])
def test_columns_are_added_in_pairs_without_a_loss(steps: int) -> None:
    found = history(steps, max_columns=4)
    assert 2 <= len(found) <= 4
    assert found.steps[-1] == 10 * steps and found.steps == sorted(set(found.steps))
    edges = [0, *(step // 10 for step in found.steps)]
    for column, (begin, end) in enumerate(itertools.pairwise(edges)):
        numbers = range(begin + 1, end + 1)
        loads = np.array([sum(numbers), 10 * len(numbers)])
        assert found.ratio_EC(0)[:, column].tolist() == pytest.approx(loads / loads.mean())


def test_the_least_balanced_layers_are_those_of_the_last_quarter() -> None:
    found = LoadOverSteps()
    for step in range(1, 9):
        early = step <= 6
        found.add(step, [[9, 1] if early else [5, 5], [5, 5], [5, 5] if early else [8, 2], [6, 4]])
    assert found.least_balanced_layers(3) == [2, 3, 0]
    assert found.largest_LC()[:, -1].tolist() == pytest.approx([1.0, 1.0, 1.6, 1.2])


def test_a_step_without_tokens_has_no_value() -> None:
    found = LoadOverSteps()
    found.add(1, [[0, 0], [3, 1]])
    assert np.isnan(found.ratio_EC(0)).all() and found.least_balanced_layers(1) == [1]


def test_another_model_and_an_odd_number_of_columns_are_refused() -> None:
    found = history(1)
    with pytest.raises(ValueError, match="add the steps of one model"):
        found.add(20, [[1, 1]])
    with pytest.raises(ValueError, match="use an even number"):
        LoadOverSteps(3)


def test_loads_are_relative_to_the_targets_of_the_experts() -> None:
    found = LoadOverSteps(target_shares=lambda experts: (0.5, 0.25, 0.25) if experts == 3 else None)
    found.add(1, [[20, 10, 10], [30, 10]])
    assert found.has_targets and not history(1).has_targets
    assert found.ratio_EC(0).tolist() == [[1.0], [1.0], [1.0]] and found.ratio_EC(1).tolist() == [[1.5], [0.5]]
    assert found.largest_LC().tolist() == [[1.0], [1.5]]
