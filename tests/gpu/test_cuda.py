"""On a CUDA device: the layer against its CPU twin, the engine on NCCL in a world of one, and the main job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from dist_moe.balancing.balancer import Balancer
from dist_moe.comm.exchange import start_exchange_counts, start_exchange_rows
from dist_moe.comm.init import init_distributed
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.config.sections.model import CrossEntropyName
from dist_moe.engine.deepspeed import EngineSettings, start_engine
from dist_moe.model.attention import documents_attention, documents_mask
from dist_moe.model.build import parameter_groups
from dist_moe.model.cross_entropy import choose_cross_entropy, chunked_nll_sum, plain_nll_sum
from dist_moe.model.inputs import Documents, find_documents, model_inputs
from dist_moe.model.norm import FusedRMSNorm
from dist_moe.model.routing import count_record
from dist_moe.moe.experts import GroupedExperts, grouped_linear
from dist_moe.moe.kernels import ANY_DEVICE, triton_kernels
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.row_order import sort_slots
from dist_moe.moe.select import ThresholdRouting, TopK
from dist_moe.train.step import train_step
from dist_moe.worker.rank_info import RankInfo
from tests.dist.policies import EXPERTS, POLICIES, logits_of
from tests.dist.small import DEEPSEEK, ROWS, Case, make_balancer, make_task, ragged_batch, share

pytestmark = pytest.mark.gpu
ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_equals_a_loop_on_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts_e = torch.tensor([5, 0, 17, 2])
    rows = torch.randn(24, 32, generator=generator).to(dtype).cuda().requires_grad_()
    weight = torch.randn(4, 48, 32, generator=generator).to(dtype).cuda().requires_grad_()
    ends = counts_e.cumsum(0).to(device="cuda", dtype=torch.int32)
    found = grouped_linear(rows, weight, ends)
    found.float().square().sum().backward()
    wide_rows, wide_weight = (t.detach().double().cpu().requires_grad_() for t in (rows, weight))
    parts = zip(wide_rows.split(counts_e.tolist()), wide_weight, strict=True)
    wanted = torch.cat([part @ one.T for part, one in parts])
    wanted.square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in ((found, wanted), (rows.grad, wide_rows.grad), (weight.grad, wide_weight.grad)):
        assert ours is not None and theirs is not None
        error = (ours.detach().double().cpu() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < tolerance


def test_the_layer_gives_the_same_gradients_twice_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = ExpertParallelLayer(GroupedExperts(4, 32, 16, torch.nn.functional.silu), 4, ALONE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.cuda().bfloat16()
    hidden = torch.randn(4096, 32, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(4096, 4, device="cuda").topk(2).indices
    weights = torch.rand(4096, 2, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for _ in range(2):
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        layer(leaf, ids, weights).float().square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])  # type: ignore
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 256, 3000])
def test_the_kernels_of_triton_equal_those_of_torch(dtype: torch.dtype, width: int) -> None:
    fused = triton_kernels()
    generator = torch.Generator().manual_seed(0)
    rows_QD = torch.randn(26, width, generator=generator).to(dtype).cuda()
    rows_QD[24:] = float("nan")
    row_TK = (
        torch.randperm(24, generator=generator).view(8, 3).masked_fill(torch.rand(8, 3, generator=generator) < 0.3, -1)
    )
    gate_up_QF, weights_Q1, probe_QF = (
        torch.randn(9, size, generator=generator).to(dtype).cuda() for size in (2 * width, 1, width)
    )
    results = []
    for kernels in (fused, ANY_DEVICE):
        leaves = [leaf.clone().requires_grad_() for leaf in (gate_up_QF, weights_Q1)]
        gated_QF = kernels.swiglu(*leaves)
        gated_QF.backward(probe_QF)
        results.append([kernels.gather_sum(rows_QD, row_TK.cuda()), gated_QF.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance * width**0.5)


@pytest.mark.parametrize("tokens", [0, 1, 700, 5000])
@pytest.mark.parametrize("experts", [1, 8, 1500])
def test_triton_orders_rows_as_torch_does(tokens: int, experts: int) -> None:
    fused, senders = triton_kernels(), 4
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(-1, experts, (tokens, 3), generator=generator).cuda()
    arriving_Pe = torch.randint(0, 3000 // experts + 2, (senders, experts), generator=generator).cuda()
    orders, placements = [], []
    for kernels in (fused, ANY_DEVICE):
        rows, ends_E, counts_E = sort_slots(ids_TK, experts, kernels.number_rows, remove_empty=False)
        orders.append((rows.slot_R, rows.token_R, rows.row_TK, ends_E, counts_E))
        placements.append(kernels.place_rows(arriving_Pe, int(arriving_Pe.sum()), 1))
        assert placements[-1].padding is None
    torch.testing.assert_close(*orders, rtol=0, atol=0)
    for name in ("place_R", "source_Q", "ends_e"):
        torch.testing.assert_close(*(getattr(placement, name) for placement in placements), rtol=0, atol=0)


@pytest.mark.parametrize("rule", [TopK(2, "sigmoid", normalize=True), ThresholdRouting(0.5, 4)])
def test_trap_T52_the_host_waits_for_nothing_in_a_layer(rule: TopK | ThresholdRouting) -> None:
    router, experts = Router(8, 64, rule), GroupedExperts(8, 64, 32, torch.nn.functional.silu)
    layer = ExpertParallelLayer(experts, 8, ALONE).cuda().bfloat16()
    router.cuda().bfloat16()
    for parameter in (*router.parameters(), *layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    hidden_TD = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probe_TD = torch.randn_like(hidden_TD)
    exists_T = torch.rand(512, device="cuda") > 0.1

    def run() -> None:
        router.open_record(exists_T)
        _, weights_TK, ids_TK = router(hidden_TD)
        layer(hidden_TD, ids_TK, weights_TK).backward(probe_TD)
        count_record(router, router.close_record(), needs_margins=True)

    run()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_trap_T52_an_exchange_waits_once_for_pinned_counts() -> None:
    with init_distributed(RankInfo(), "nccl", 60):
        world = dist.group.WORLD
        assert world is not None
        counts_PN = torch.tensor([[3, 0, 4]], device="cuda")
        rows_RD = torch.randn(7, 32, device="cuda", requires_grad=True)

        def run() -> None:
            _, send, receive = start_exchange_counts(counts_PN, world).finish()
            assert (send, receive) == ([7], [7])
            in_flight = start_exchange_rows([rows_RD], send, receive, world)
            (arrived_QD,) = in_flight.finish()
            arrived_QD.sum().backward()

        run()  # makes the communicator
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()  # the wait for an event is none for the whole device
        finally:
            torch.cuda.set_sync_debug_mode("default")
        arriving_PN, _, _ = start_exchange_counts(counts_PN, world).finish()
        assert torch.equal(arriving_PN, counts_PN)
        assert rows_RD.grad is not None and torch.equal(rows_RD.grad, torch.full_like(rows_RD, 2.0))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_world_of_one_on_nccl_trains(stage: int, bf16: bool) -> None:
    case = Case(zero_stage=stage, bf16=bf16, clipping=1.0, model=dict(DEEPSEEK))
    with init_distributed(RankInfo(), "nccl", 60) as world:
        mesh = make_mesh(1)
        task = make_task(case, mesh)
        settings = EngineSettings(stage, ROWS, 1, "adamw", 1.0, bf16)
        losses = []
        with start_engine(task, parameter_groups(task.model, 0.1), settings, mesh) as engine:
            balancer = make_balancer(task, device=world.device)
            batches = share(ragged_batch(), mesh, 1)
            for _ in range(20):
                record = train_step(engine, balancer, batches, 1e-2)
                losses.append(float(record.nll_sum) / record.label_tokens)
                assert record.taken
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_counts_and_moves_on_the_device_as_on_the_cpu(name: str) -> None:
    """The same logits give the same integers, and those the same bias."""
    rule, policy, target = POLICIES[name]
    states = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        router = Router(EXPERTS, EXPERTS, rule).to(device)
        torch.nn.init.eye_(router.weight)
        balancer = Balancer({"layer": router}, policy, device, 100, target)
        for step in range(3):
            router.open_record(None)
            router(logits_of(step, 0).to(device))
            balancer.observe([count_record(router, router.close_record(), policy.needs_margins)])
            balancer.step()
        states.append([router.selection_bias.cpu(), router.last_load.cpu()])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["chunked", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_that_of_the_logits(name: CrossEntropyName, dtype: torch.dtype) -> None:
    if name == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, device="cuda", dtype=dtype)
    hidden_TD = torch.randn(700, 64, device="cuda", dtype=dtype, requires_grad=True)
    targets_T = torch.randint(0, 1000, (700,), device="cuda").masked_fill(torch.rand(700, device="cuda") < 0.2, -100)
    cross_entropy = choose_cross_entropy(name, hidden_TD.device)
    assert cross_entropy is not None
    results = []
    for nll_sum in (cross_entropy(hidden_TD, head, targets_T), plain_nll_sum(head(hidden_TD), targets_T)):
        results.append([nll_sum, *torch.autograd.grad(nll_sum * 0.01, [hidden_TD, head.weight])])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", [(8, 8, 64, 64), (8, 2, 64, 64), (4, 4, 96, 64)])
def test_attention_by_starts_of_documents_equals_sdpa_with_a_mask(
    shape: tuple[int, int, int, int], window: int | None
) -> None:
    heads, groups, width, value_width = shape
    torch.manual_seed(0)
    documents_BS = torch.stack([torch.arange(256) // 100, torch.arange(256) // 256])
    starts_N1, longest = find_documents(documents_BS)
    starts_N1 = starts_N1.cuda()
    leaves = [
        torch.randn(2, 256, *size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for size in ((heads, width), (groups, width), (groups, value_width))
    ]
    query, key, value = leaves
    mask_B1SS = documents_mask(starts_N1, 2, 256, window)
    keys, values = (each.repeat_interleave(heads // groups, 1) for each in (key, value))
    wanted = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask_B1SS, scale=0.1).transpose(1, 2)
    found = documents_attention(query, key, value, Documents(starts_N1, longest), 0.1, window)
    gradient = torch.randn_like(wanted)
    ours = [found, *torch.autograd.grad(found, leaves, gradient)]
    theirs = [wanted, *torch.autograd.grad(wanted, leaves, gradient)]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    """By Liger's kernel where it is installed."""
    torch.manual_seed(0)
    theirs = Qwen3MoeRMSNorm(64).to("cuda", dtype)
    torch.nn.init.normal_(theirs.weight, mean=1.0)
    x_TD = torch.randn(500, 64, device="cuda", dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x_TD)
    results = []
    for norm in (FusedRMSNorm(theirs.weight, 1e-6), theirs):
        results.append([found := norm(x_TD), *torch.autograd.grad(found, [x_TD, theirs.weight], gradient)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


def test_the_inputs_of_a_model_and_its_attention_wait_for_nothing() -> None:
    batch = ragged_batch()
    query = torch.randn(len(batch.tokens_BS), 4, batch.tokens_BS.shape[1], 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = model_inputs(batch, query.device)
        assert inputs.documents is not None
        documents_attention(query, query, query, inputs.documents, 0.1, None)
        head = torch.nn.Linear(64, 100, device="cuda")
        chunked_nll_sum(query[0, 0].float(), head, torch.zeros(query.shape[2], dtype=torch.int64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_main_job_on_the_device(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_moe", "train", "configs/quickstart.yaml", f"run.dir={tmp_path}"]
    subprocess.run(command, check=True, timeout=900, cwd=Path(__file__).parents[2])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bits_per_byte"] <= 2.6
    assert max(last["max_vio_global_per_layer"]) < 0.25
