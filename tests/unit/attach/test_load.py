"""The load of a step, compared with its measures in a few obvious lines."""

import json
from statistics import fmean, pstdev

import pytest
import torch

from dist_moe.attach.load import Load
from dist_moe.balancing.counts import RoutingCounts

COUNTS = ((6, 0, 2, 0), (1, 3))


def make_load(*counts: tuple[int, ...]) -> Load:
    """Of layers whose tokens took two experts each."""
    layers = [RoutingCounts(torch.tensor(each), torch.tensor([0, sum(each) // 2])) for each in counts]
    names = tuple(f"layers.{place}.mlp" for place in range(len(counts)))
    return Load(7, True, names, (torch.zeros(4), None), 0.001, tuple(layers))


def test_the_measures_of_a_step() -> None:
    load = make_load(*COUNTS)
    assert load.counts_LE == COUNTS and all(type(count) is int for layer in load.counts_LE for count in layer)
    assert load.tokens == 4
    vios = [max(layer) / fmean(layer) - 1 for layer in COUNTS]
    assert vios == [2.0, 0.5]
    assert load.max_vio_per_layer == pytest.approx(vios) and load.max_vio == pytest.approx(1.25)
    shares = [[100 * count / sum(layer) for count in layer] for layer in COUNTS]
    assert load.deviation_percent == pytest.approx(fmean(pstdev(layer) for layer in shares), rel=1e-6)
    assert load.dead == 2


def test_the_floors_are_those_of_a_random_choice() -> None:
    """The expectation over many random choices of a step with 2000 assignments to 8 experts, and with 8."""
    generator = torch.Generator().manual_seed(0)
    for assignments in (2000, 8):
        drawn_NT = torch.randint(8, (4000, assignments), generator=generator)
        counts_NE = torch.nn.functional.one_hot(drawn_NT, 8).sum(dim=1).double()
        mean = assignments / 8
        load = make_load((assignments, *[0] * 7))
        assert load.dead_floor == pytest.approx(float((counts_NE == 0).sum(dim=1).double().mean()), rel=0.05, abs=0.01)
        shares_NE = 100 * counts_NE / assignments
        deviation = float(shares_NE.var(dim=1, correction=0).mean().sqrt())
        assert load.deviation_percent_floor == pytest.approx(deviation, rel=0.05)
        if assignments == 2000:
            assert load.max_vio_floor == pytest.approx(float((counts_NE.amax(dim=1) / mean - 1).mean()), rel=0.1)


def test_as_plain_values() -> None:
    load = make_load(*COUNTS)
    plain = load.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["load"] == {"layers.0.mlp": [6, 0, 2, 0], "layers.1.mlp": [1, 3]}
    assert (plain["step"], plain["taken"], plain["tokens"]) == (7, True, 4)
    measures = ("max_vio", "max_vio_floor", "deviation_percent", "deviation_percent_floor", "dead", "dead_floor")
    for name in (*measures, "experts_per_token"):
        assert plain[name] == getattr(load, name)
    assert len(plain) == 11
    assert load.experts_per_token == pytest.approx(2.0)


def test_the_device_is_not_read_before_a_number_is_asked_for() -> None:
    counts = RoutingCounts(torch.empty(4, dtype=torch.int64, device="meta"), torch.empty(2, device="meta"))
    load = Load(1, True, ("mlp",), (None,), 0.0, (counts,))
    assert "meta" not in repr(load) and load.step == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = load.counts_LE
