"""Tests of the pictures of the load: each cell is that of its layer, expert and step."""

import numpy as np
import pytest

from dist_moe.observe.pictures.load import draw_experts_over_steps, draw_layers_over_steps, draw_load, shown_layers
from dist_moe.observe.pictures.over_steps import LoadOverSteps
from dist_moe.observe.pictures.scale import EMPTY_RGB, NO_TOKENS_RGB, colors


def color(ratio: float) -> tuple[int, ...]:
    return tuple(colors(np.array(ratio)).tolist())


def many_layers(layers: int, experts: int, steps: int, worst: int) -> LoadOverSteps:
    """Return an even load, but expert 3 of the layer `worst` has four times the mean from half of the steps on."""
    history = LoadOverSteps()
    for step in range(1, steps + 1):
        load = [[100] * experts for _ in range(layers)]
        if step > steps // 2:
            load[worst] = [80] * experts
            load[worst][3] = 80 * 4
        history.add(step, load)
    return history


def test_each_cell_has_the_color_of_its_own_expert_and_layer() -> None:
    loads = [[0, 40, 20], [20, 20, 20], [1, 59, 0], [90, 30]]
    picture = draw_load(loads)
    for layer, row in enumerate(loads):
        for expert, count in enumerate(row):
            assert picture.color(layer, expert) == color(count / (sum(row) / len(row))), (layer, expert)
    assert picture.color(3, 2) == EMPTY_RGB
    assert picture.color(0, 0) == picture.color(2, 2) == NO_TOKENS_RGB


@pytest.mark.parametrize(("layers", "experts", "most_rows"), [(1, 4, 4), (3, 8, 8), (60, 256, 256), (12, 896, 896)])
def test_every_picture_is_legible_in_a_card_of_tensorboard(layers: int, experts: int, most_rows: int) -> None:
    history = many_layers(layers, experts, 300, worst=0)
    pictures = [
        draw_load([[1] * experts] * layers),
        draw_layers_over_steps(history),
        draw_experts_over_steps(history, 0),
    ]
    for picture, rows in zip(pictures, (layers, layers, most_rows), strict=True):
        height, width = picture.pixels.shape[:2]
        assert 300 < width <= (345 if experts <= 256 else experts + 60), "a card has 345 pixels of width"
        assert 100 < height <= max(215, 90 + rows), "a card has 215 pixels of height for a picture"


def test_the_layers_over_steps_show_the_most_loaded_expert_of_each() -> None:
    picture = draw_layers_over_steps(many_layers(60, 8, 20, worst=41))
    mean = (7 * 80 + 320) / 8
    assert picture.color(41, 19) == color(320 / mean) != picture.color(41, 9) == color(1.0)
    assert {picture.color(layer, 19) for layer in range(60) if layer != 41} == {color(1.0)}


def test_trap_T74_the_experts_over_steps_show_the_worst_layers_first() -> None:
    history = many_layers(60, 8, 20, worst=41)
    mean = (7 * 80 + 320) / 8
    layers = shown_layers(history)
    assert len(layers) == 4 and layers[0] == 41
    worst, other = (draw_experts_over_steps(history, layer) for layer in layers[:2])
    assert worst.color(3, 19) == color(320 / mean)
    assert worst.color(2, 19) == color(80 / mean)
    assert worst.color(3, 9) == other.color(3, 19) == color(1.0)


def test_a_few_layers_are_all_shown_in_order() -> None:
    history = many_layers(3, 8, 20, worst=2)
    assert shown_layers(history) == [0, 1, 2]
    pictures = [draw_experts_over_steps(history, layer) for layer in range(3)]
    assert pictures[2].color(3, 19) != pictures[0].color(3, 19) == pictures[1].color(3, 19) == color(1.0)


def test_with_target_shares_a_load_on_its_target_has_the_color_of_1() -> None:
    picture = draw_load([[60, 20], [20, 60]], target_shares=lambda _: (0.75, 0.25))
    assert picture.color(0, 0) == picture.color(0, 1) == color(1.0)
    assert picture.color(1, 0) == color(1 / 3) and picture.color(1, 1) == color(3.0)


@pytest.mark.parametrize("load", [[], [[]]])
def test_a_model_without_experts_has_no_picture(load: list[list[int]]) -> None:
    history = LoadOverSteps()
    with pytest.raises(ValueError, match="needs an MoE model"):
        draw_load(load)
    with pytest.raises(ValueError, match="needs one of an MoE model"):
        draw_layers_over_steps(history)
    with pytest.raises(ValueError, match="needs one of an MoE model"):
        draw_experts_over_steps(history, 0)
