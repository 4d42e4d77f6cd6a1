"""Tests of which steps are observed, and of the distributions of scores and gate weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config
from dist_moe.data.labeled.stream import LabeledBatch
from dist_moe.data.stream import Batch
from dist_moe.moe.records import RouterRecord
from dist_moe.moe.router import Router
from dist_moe.moe.select import TopK
from dist_moe.observe.routing.observer import MAX_VALUES, RoutingObserver, distributions, pictures_are_due, tokens_of
from dist_moe.observe.routing.trace import read_trace

CONFIG = Path(__file__).parents[4] / "configs" / "debug.yaml"
ROUTERS = [Router(4, 3, TopK(2, "sigmoid"))] * 2


def routed(tokens: int = 6, padding: bool = True) -> list[RouterRecord]:
    mask_T = torch.ones(tokens, dtype=torch.bool)
    mask_T[-1] = not padding
    records = []
    for layer, router in enumerate(ROUTERS):
        torch.nn.init.constant_(router.weight, 0.1 + layer)
        router.open_record(mask_T)
        router(torch.rand(tokens, 3, generator=torch.Generator().manual_seed(layer)))
        records.append(router.close_record().detached())
    return records


def batch() -> Batch:
    tokens_BS = torch.arange(6).view(2, 3)
    documents_BS = torch.zeros(2, 3, dtype=torch.int64)
    documents_BS[-1, -1] = -1
    return Batch(tokens_BS, tokens_BS, documents_BS, tokens_BS, documents_BS)


@pytest.mark.parametrize(
    ("interval", "logged", "due"),
    [
        (100, 10, [100, 200, 300, 305]),
        (100, 30, [120, 210, 300, 305]),
        (10, 100, [100, 200, 300, 305]),
        (0, 10, [305]),
        (1000, 1, [305]),
    ],
)
def test_pictures_are_drawn_in_the_first_logged_step_of_each_interval(
    interval: int, logged: int, due: list[int]
) -> None:
    assert [step for step in range(1, 306) if pictures_are_due(step, interval, logged, 305)] == due


def observer(folder: Path, mesh: Mesh, *overrides: str) -> RoutingObserver:
    keys = [f"run.dir={folder}", "train.steps=20", "observe.interval=5", "observe.picture_interval=10", *overrides]
    return RoutingObserver(load_config(CONFIG, keys), mesh, ROUTERS, ("text",))


def test_only_steps_that_are_drawn_or_traced_are_observed(tmp_path: Path) -> None:
    rank_0 = observer(tmp_path, Mesh(2, 0, 2))
    rank_1 = observer(tmp_path, Mesh(2, 1, 2))
    traced = observer(tmp_path, Mesh(2, 1, 2), "observe.trace_interval=4")
    silent = observer(tmp_path, Mesh(2, 0, 2), "observe.tensorboard=false")
    found = []
    for which in (rank_0, rank_1, traced, silent):
        steps = []
        for step in range(1, 21):
            record_forward = which.begin(step, [batch()], [range(2)])
            if record_forward is not None:
                steps.append(step)
                record_forward(routed())
            drawn = which.finish(step, taken=True)
            assert (drawn is not None) == (which is rank_0 and step in (10, 20))
        found.append(steps)
    assert found == [[10, 20], [], [1, 4, 8, 12, 16, 20], []]
    assert sorted(set(read_trace(tmp_path).loads["step"].to_pylist())) == [1, 4, 8, 12, 16, 20]


def test_a_batch_of_labeled_texts_has_no_domains() -> None:
    mask_BS = torch.tensor([[True, False]])
    labeled = LabeledBatch(torch.ones(1, 2, dtype=torch.int64), mask_BS, torch.zeros(1, 2), torch.zeros(1))
    found = tokens_of(labeled)
    assert found.domains_BS is None and found.present_BS is mask_BS
    assert tokens_of(batch()).present_BS.tolist() == [[True] * 3, [True, True, False]]


def test_the_distributions_are_those_of_the_tokens_that_are_not_padding() -> None:
    records = routed()
    found = distributions(ROUTERS, records)
    scores = torch.stack([record.logits_TE[:-1] for record in records]).sigmoid()
    weights = torch.stack([record.weights_TK[:-1] for record in records])
    assert np.allclose(found["router_scores"], scores.reshape(-1)) and len(found["router_scores"]) == 2 * 5 * 4
    assert np.allclose(found["gate_weights"], weights.reshape(-1)) and len(found["gate_weights"]) == 2 * 5 * 2


def test_a_distribution_of_many_tokens_is_a_sample() -> None:
    found = distributions(ROUTERS, routed(tokens=MAX_VALUES, padding=False))
    assert MAX_VALUES // 2 <= len(found["router_scores"]) <= MAX_VALUES
