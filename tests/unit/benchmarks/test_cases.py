"""Tests of the cases as data, and of the description of the machine."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.block.blocks import BLOCKS, ours, skew, threshold_for
from benchmarks.block.blocks import tokens as block_tokens
from benchmarks.cases import CASES, QUICK, BlockCase, StepCase
from benchmarks.environment import describe, hardware_name, read_cpuinfo
from benchmarks.step.programs import PROGRAMS, write_configuration
from dist_moe.config import load_config, resolve
from dist_moe.launch.launchers import launcher_names

STEPS = [case for case in CASES.values() if isinstance(case, StepCase)]


def test_every_case_names_programs_that_exist() -> None:
    for case in CASES.values():
        if isinstance(case, StepCase):
            assert {entry.program for entry in case.entries} <= set(PROGRAMS), case.name
            assert len({entry.name for entry in case.entries}) == len(case.entries), case.name
        elif isinstance(case, BlockCase):
            assert set(case.programs) <= set(BLOCKS), case.name
        else:
            assert set(case.launchers) <= {*launcher_names(), "none"}


def test_the_quick_cases_are_among_all() -> None:
    assert {case.name for case in QUICK} < set(CASES) and len(QUICK) == 7
    for case in QUICK:
        if isinstance(case, StepCase):
            everything = CASES[case.name]
            assert isinstance(everything, StepCase) and set(case.entries) < set(everything.entries), case.name


def test_the_quick_cases_have_a_full_step_beside_grouped_mm_of_transformers() -> None:
    (case,) = (case for case in QUICK if case.name == "ep1-fp32")
    assert isinstance(case, StepCase) and case.expert_parallel == 1
    assert [entry.name for entry in case.entries] == ["ours-gloo", "hf-tuned"]


def test_every_case_is_a_configuration_of_this_package(tmp_path: Path) -> None:
    # Each only once: most cases differ in their programs.
    seen = list[tuple[str, ...]]()
    for case in STEPS:
        path = write_configuration(case, tmp_path / case.name, "gloo")
        assert load_config(path).train.global_batch_size * case.length == case.tokens
        for entry in case.entries:
            overrides = (*case.overrides, *entry.overrides)
            if case.precision == "fp32" and (case.architecture, *overrides) not in seen:
                seen.append((case.architecture, *overrides))
                assert resolve(load_config(path, overrides), case.workers).expert_parallel == case.expert_parallel
    assert len(seen) == 6


def test_the_machine_is_described(tmp_path: Path) -> None:
    environment = describe()
    assert environment["cores"] >= 1 and environment["packages"]["torch"] and environment["commit"]
    other = {"cpu": "AMD EPYC 9R14 (x64)", "cpu_family": "25-17", "cores": 2}
    assert hardware_name(other) == "amd-epyc-9r14-x64-family-25-17-2-cores"
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: A CPU\nflags\t\t: sse avx512_bf16\n\nmodel name\t: another\n")
    assert read_cpuinfo(file)["model name"] == "A CPU"


def test_the_threshold_gives_the_number_of_experts() -> None:
    logits_TE = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    sorted_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True).values
    taken_TE = sorted_TE.cumsum(dim=-1) - sorted_TE < threshold_for(logits_TE, 2.0)
    assert float(taken_TE.sum()) / 4000 == pytest.approx(2.0, abs=0.01)


def test_the_skew_orders_the_load_of_the_experts() -> None:
    case = BlockCase(name="tiny", hidden=32, width=16, experts=8, top_k=2, tokens=4096, precision="fp32")
    block = ours(case)
    skew(block, 1.0)
    probabilities_E = F.linear(block_tokens(case, seed=0), block.router_weight_ED).softmax(dim=-1).mean(dim=0)
    expected_E = 1 / torch.arange(1, 9)
    torch.testing.assert_close(probabilities_E, expected_E / expected_E.sum(), rtol=0.1, atol=0.0)
