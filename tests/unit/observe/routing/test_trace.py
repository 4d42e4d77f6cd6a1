"""Tests of the trace: what is written is what the routers did, and a resumed run doubles no step."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_moe.comm.mesh import Mesh
from dist_moe.config.checks import packages
from dist_moe.errors import UserError
from dist_moe.moe.records import RouterRecord
from dist_moe.observe.routing.trace import TokensOfBatch, TraceRecorder, count_sequences, read_trace

LAYERS, EXPERTS, LENGTH = 2, 5, 6
DOMAINS = ("poems", "code")


def batch_of(sequences: int, seed: int) -> TokensOfBatch:
    """Return tokens 100 * sequence + position; the last position of the last sequence is padding."""
    numbers = torch.arange(seed, seed + sequences).unsqueeze(1)
    tokens_BS = 100 * numbers + torch.arange(LENGTH)
    present_BS = torch.ones(sequences, LENGTH, dtype=torch.bool)
    present_BS[-1, -1] = False
    return TokensOfBatch(tokens_BS, present_BS, (numbers % 2).expand(sequences, LENGTH).contiguous())


def records_of(batch: TokensOfBatch, seed: int) -> list[RouterRecord]:
    """Return two experts for each token, the second one missing for every third token, and none for padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = batch.tokens_BS.numel()
    records = []
    for _ in range(LAYERS):
        ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
        ids_TK[::3, 1] = -1
        ids_TK[~batch.present_BS.reshape(-1)] = -1
        weights_TK = torch.rand(tokens, 2, generator=generator) * (ids_TK >= 0)
        logits_TE = torch.rand(tokens, EXPERTS, generator=generator)
        records.append(RouterRecord(logits_TE, ids_TK, batch.present_BS.reshape(-1), weights_TK))
    return records


def record_step(recorder: TraceRecorder, step: int, micro_batches: int = 2, taken: bool = True) -> list[Any]:
    """Record a step of two sequences in each micro-batch -> the records."""
    recorder.begin(step)
    kept = []
    for number in range(micro_batches):
        batch = batch_of(2, seed=2 * number)
        kept.append((batch, records_of(batch, seed=10 * step + number)))
        recorder.add(batch, range(2 * number, 2 * number + 2), kept[-1][1])
    recorder.finish(step, taken)
    return kept


def recorder_of(folder: Path, mesh: Mesh | None = None, tokens: int = 3, steps_done: int = 0) -> TraceRecorder:
    return TraceRecorder(folder, mesh or Mesh(1, 0, 1), 10, tokens, DOMAINS, steps_done)


def test_trap_T75_the_counts_of_a_sequence_are_those_of_its_tokens(tmp_path: Path) -> None:
    kept = record_step(recorder_of(tmp_path), 10)
    rows = read_trace(tmp_path).loads.to_pylist()
    assert len(rows) == 2 * LAYERS * 2
    for row in rows:
        batch, records = kept[row["micro_batch"]]
        index = row["sequence"] - 2 * row["micro_batch"]
        ids = records[row["layer"]].ids_TK.view(2, LENGTH, 2)[index]
        assert row["load"] == [int((ids == expert).sum()) for expert in range(EXPERTS)]
        assert row["tokens"] == int(batch.present_BS[index].sum())
        assert (row["step"], row["rank"], row["group"]) == (10, 0, 0)


def test_trap_T75_a_sampled_token_has_its_own_experts_and_weights(tmp_path: Path) -> None:
    kept = record_step(recorder_of(tmp_path), 10)
    rows = read_trace(tmp_path).tokens.to_pylist()
    assert len(rows) == 2 * LAYERS * 2 * 3
    for row in rows:
        index = row["sequence"] - 2 * row["micro_batch"]
        record = kept[row["micro_batch"]][1][row["layer"]]
        token = index * LENGTH + row["position"]
        taken = record.ids_TK[token] >= 0
        assert row["token"] == 100 * row["sequence"] + row["position"]
        assert row["domain"] == DOMAINS[row["sequence"] % 2]
        assert row["experts"] == record.ids_TK[token][taken].tolist() != []
        assert row["weights"] == pytest.approx(record.weights_TK[token][taken].tolist())
    positions = {(row["sequence"], row["position"]) for row in rows if row["layer"] == 0}
    assert positions == {(row["sequence"], row["position"]) for row in rows if row["layer"] == 1}


def test_the_same_tokens_are_sampled_in_any_layout_and_never_padding(tmp_path: Path) -> None:
    record_step(recorder_of(tmp_path / "a", tokens=LENGTH), 10)
    record_step(recorder_of(tmp_path / "b", Mesh(4, 3, 2), tokens=3), 10)
    every, some = (read_trace(tmp_path / name).tokens.to_pylist() for name in "ab")
    last = [row["position"] for row in every if row["sequence"] in (1, 3) and row["layer"] == 0]
    assert last == [0, 1, 2, 3, 4] * 2
    assert {(row["rank"], row["group"]) for row in some} == {(3, 1)}
    again = recorder_of(tmp_path / "c", tokens=3)
    record_step(again, 10)
    assert [row["position"] for row in read_trace(tmp_path / "c").tokens.to_pylist()] == [
        row["position"] for row in some
    ]


def test_counts_of_sequences_add_up_to_those_of_the_micro_batch() -> None:
    ids_TK = torch.from_numpy(np.random.default_rng(0).integers(-1, 7, (4 * 9, 3)))
    load_BE = count_sequences(ids_TK, 4, 7)
    assert load_BE.shape == (4, 7)
    assert load_BE.sum(dim=0).tolist() == [int((ids_TK == expert).sum()) for expert in range(7)]
    assert load_BE[2].tolist() == [int((ids_TK[18:27] == expert).sum()) for expert in range(7)]


def test_a_skipped_step_is_not_in_the_trace(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path)
    record_step(recorder, 10)
    record_step(recorder, 20, taken=False)
    assert set(read_trace(tmp_path).loads["step"].to_pylist()) == {10}


def test_the_first_step_and_multiples_of_the_interval_are_due(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path)
    assert [step for step in range(1, 31) if recorder.is_due(step)] == [1, 10, 20, 30]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_trap_T76_a_resumed_run_doubles_no_step(tmp_path: Path, workers: int) -> None:
    """Two ranks record steps 10 to 30; a run on other workers resumes after step 15."""
    for rank in range(2):
        recorder = recorder_of(tmp_path, Mesh(2, rank, 2))
        for step in (10, 20, 30):
            record_step(recorder, step)
    for rank in range(workers):
        record_step(recorder_of(tmp_path, Mesh(workers, rank, workers), steps_done=15), 20)
    loads = read_trace(tmp_path).loads.to_pylist()
    steps = [row["step"] for row in loads if row["layer"] == 0 and row["sequence"] == 0]
    assert sorted(steps) == [10] * 2 + [20] * workers
    assert len(list((tmp_path / "trace" / "replaced").rglob("*.parquet"))) == 2 * 2 * 2


def test_an_interrupted_file_is_not_read(tmp_path: Path) -> None:
    record_step(recorder_of(tmp_path), 10)
    folder = tmp_path / "trace" / "loads"
    (folder / f".step-00000020-rank-00000.parquet.{os.getpid()}").write_bytes(b"PAR1")
    assert read_trace(tmp_path).loads.num_rows == 8


def test_what_is_not_a_trace_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no file; train with observe\.trace_interval above 0"):
        read_trace(tmp_path)
    record_step(recorder_of(tmp_path), 10)
    (path,) = (tmp_path / "trace" / "tokens").iterdir()
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(UserError, match="is not a trace of version 1; move it away"):
        read_trace(tmp_path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rank-00000\.parquet cannot be read \("):
        read_trace(tmp_path)
    monkeypatch.setattr("dist_moe.observe.routing.trace.has_pyarrow", lambda: False)
    with pytest.raises(UserError, match="pyarrow is not installed; pip install"):
        read_trace(tmp_path)
    assert packages.has_pyarrow()


def test_a_full_disk_costs_the_trace_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = recorder_of(tmp_path)
    (tmp_path / "trace").write_text("a file in place of the folder")
    record_step(recorder, 10)
    record_step(recorder, 20)
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot write {tmp_path}/trace (Not a directory); training continues, and its trace has a gap"
    ]
    (tmp_path / "trace").unlink()
    record_step(recorder, 30)
    assert set(read_trace(tmp_path).loads["step"].to_pylist()) == {30}
