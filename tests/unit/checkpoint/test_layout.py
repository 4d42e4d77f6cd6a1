"""Which checkpoint a run goes on from, what is said of a damaged one, and what a save that fails leaves behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import checkpoints, recover
from dist_moe.checkpoint.format.manifest import read_manifest
from dist_moe.checkpoint.resume import find_checkpoint
from dist_moe.data.corpus import TokenizedData
from dist_moe.train.setup import tokenize
from tests.dist.resumable import tensors
from tests.unit.train.runs import ALONE, CPU, MORE, STATE, WEIGHTS, find, settings, step, train

Damage = Callable[[Path], object]


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_the_newest_is_taken_and_latest_names_it(text: Path, run: Path) -> None:
    found = find(text, run)
    assert found is not None and found.folder == step(run, 6) and found.passed_over == ()
    assert (run / "checkpoints/latest").read_text() == "step-000006\n"
    assert find(text, run, "checkpoint.resume=never") is None
    assert find(text, run / "elsewhere") is None
    by_path = find(text, run / "elsewhere", f"checkpoint.resume={step(run, 2)}")
    assert by_path is not None and by_path.counters.step == 2


def link(path: Path) -> None:
    """The same content, but by a symbolic link, which may lead anywhere."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def of_another_step(folder: Path) -> None:
    shutil.copytree(step(folder.parents[1], 4), folder, dirs_exist_ok=True)


DAMAGES: dict[str, tuple[str, Damage]] = {
    "bit of a weight": (f"{WEIGHTS} was changed", lambda at: flip(at / WEIGHTS)),
    "weights cut short": ("bytes instead of", lambda at: cut(at / WEIGHTS)),
    "weights gone": (f"{WEIGHTS} is missing", lambda at: (at / WEIGHTS).unlink()),
    "bit of a moment": (f"{STATE} was changed", lambda at: flip(at / STATE)),
    "weights in place of moments": ("bytes instead of", lambda at: shutil.copy(at / WEIGHTS, at / STATE)),
    "a link in place of a file": ("is missing", lambda at: link(at / STATE)),
    "manifest gone": ("has no manifest.json", lambda at: (at / "manifest.json").unlink()),
    "manifest cut short": ("manifest.json cannot be used", lambda at: cut(at / "manifest.json", 9)),
    "manifest of another step": ("its manifest is that of step 4", of_another_step),
    "numbers gone": ("training.json cannot be used", lambda at: (at / "state/training.json").unlink()),
    "a file more": (
        "state/rank-00001.safetensors is not in its manifest",
        lambda at: shutil.copy(at / STATE, at / MORE),
    ),
    "config changed": ("config.yaml was changed", lambda at: flip(at / "config.yaml", 5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(text: Path, run: Path, damage: str) -> None:
    told, harm = DAMAGES[damage]
    harm(step(run, 6))
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=.*step-000006 cannot be used"):
        find(text, run, f"checkpoint.resume={step(run, 6)}")
    found = find(text, run)
    assert found is not None and found.folder == step(run, 4)
    assert len(found.passed_over) == 1 and "step-000006" in found.passed_over[0] and told in found.passed_over[0]


def test_where_none_is_good_the_run_does_not_begin_anew_by_itself(text: Path, run: Path) -> None:
    for number in (2, 4, 6):
        flip(step(run, number) / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .*step-000002.*begin anew with checkpoint\.resume=never"
    ):
        find(text, run)


def test_an_unfinished_one_is_named_and_not_taken(text: Path, run: Path) -> None:
    step(run, 6).rename(step(run, 6).with_name("step-000006.partial"))
    found = find(text, run)
    assert found is not None and found.folder == step(run, 4)
    assert "step-000006.partial was not finished, and is removed" in found.passed_over[0]


def test_what_a_crash_left_between_two_names_is_put_back(run: Path) -> None:
    own = run / "checkpoints"
    step(run, 6).rename(own / "step-000006.replaced")
    shutil.copytree(step(run, 4), own / "step-000004.replaced")
    recover(own)
    assert [number for number, _ in checkpoints(own)] == [2, 4, 6]
    assert not (own / "step-000004.replaced").exists(), "the new one is whole: nothing to put back"


@pytest.mark.parametrize(
    ("count", "job"), [("SLURM_RESTART_COUNT", "SLURM_JOB_ID"), ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")]
)
def test_a_job_that_is_started_again_goes_on_whatever_it_was_told_at_first(
    text: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, job: str
) -> None:
    """From its own checkpoints, that is: those of another job in the same folder are not what it has begun."""
    described = json.loads((run / "run.json").read_text())
    described["world"]["job"] = f"{job}=7"
    (run / "run.json").write_text(json.dumps(described))
    monkeypatch.setenv(count, "1")
    for number, wanted in (("8", None), ("7", 6)):
        monkeypatch.setenv(job, number)
        found = find(text, run, "checkpoint.resume=never")
        assert (found and found.counters.step) == wanted
    told = f"checkpoint.resume={step(run, 2)}"
    elsewhere = find(text, tmp_path / "empty", told)
    assert elsewhere is not None and elsewhere.counters.step == 2, "nothing of its own yet"
    monkeypatch.setenv(count, "0")
    first = find(text, run, told)
    assert first is not None and first.counters.step == 2


def test_going_back_sets_what_is_later_aside(text: Path, run: Path) -> None:
    """Else the next start would go on from what this run has left behind."""
    assert find(text, run, f"checkpoint.resume={step(run, 2)}") is not None
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-000002", "step-000004.abandoned-1", "step-000006.abandoned-1"]
    found = find(text, run)
    assert found is not None and found.counters.step == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("run.seed=1", "run.seed"),
        ("train.global_batch_size=4", "train.global_batch_size"),
        ("model.config.hidden_size=32", "model.config"),
        ("balance.policy=none", "balance.policy"),
        ("train.optimizer=sgd", "train.optimizer"),
        ("data.sequence_length=8", "data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_unless_it_is_asked_for(
    text: Path, run: Path, change: str, named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"of a run with another {named}; .*checkpoint.resume=never"):
        find(text, run, change)
    assert find(text, run, change, f"checkpoint.resume={step(run, 6)}") is not None


def test_what_may_change_does(text: Path, run: Path) -> None:
    changes = (
        "train.steps=99",
        "train.schedule_steps=null",
        "train.learning_rate=1e-4",
        "train.micro_batch_size=2",
        "parallel.zero_stage=2",
    )
    assert find(text, run, *changes, "train.precision=bf16", "observe.interval=3", "balance.rate=0.1") is not None


def test_another_text_is_refused(text: Path, run: Path) -> None:
    config = settings(text, run)
    prepared: TokenizedData = replace(tokenize(config), fingerprint="another")
    with pytest.raises(CheckpointError, match=r"is not the one that .*step-000006 has learned from"):
        find_checkpoint(config, prepared, ALONE, CPU)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"files": {"../../etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}}, "outside of its folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}}, "outside of its folder"),
        ({"files": {"model/x": {"bytes": -1, "xxh3_128": "0" * 32}}}, "cannot be used"),
        ({"files": {"model/x": {"bytes": 1, "xxh3_128": "short"}}}, "cannot be used"),
        ({"format": 1}, "is of format 1, and this dist-moe reads format 2"),
        ({"format": "1"}, "cannot be used"),
        ({"step": 1.5}, "cannot be used"),
        ({"more": 1}, "cannot be used"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, changed: dict[str, object], told: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, "step": 1, "files": {}} | changed))
    with pytest.raises(CheckpointError, match=told):
        read_manifest(tmp_path)


def test_only_what_is_to_be_kept_is_kept(text: Path, made: Path, tmp_path: Path) -> None:
    """Of steps 3 to 7 the newest two, and the multiples of 3; one of another run is set aside."""
    changes = ("train.steps=7", "checkpoint.interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    shutil.copytree(step(made, 6), step(tmp_path, 60))
    done = train(text, tmp_path, *changes, f"checkpoint.resume={step(made, 2)}")
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["latest", "step-000003", "step-000006", "step-000007"]
    assert step(tmp_path / "earlier-1", 60).is_dir()


def test_a_run_that_is_complete_is_evaluated_again_and_nothing_else(text: Path, run: Path) -> None:
    before = tensors(step(run, 6))
    done = train(text, run, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step 6 from {step(run, 6)}" in done.stdout and "validation loss" in done.stdout
    assert tensors(step(run, 6)).keys() == before.keys() and not (run / "earlier-1").exists()


def test_a_path_that_is_no_checkpoint_is_told_in_plain_words(text: Path, tmp_path: Path) -> None:
    done = train(text, tmp_path / "run", f"checkpoint.resume={tmp_path}/nowhere")
    assert done.returncode == 2
    assert f"{tmp_path}/nowhere has no manifest.json" in done.stderr and "Traceback" not in done.stderr


def test_a_failure_on_one_rank_is_told_with_its_rank() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=r"step-1 could not be saved: \[Errno 28\] No space left on device \(rank 0\)"
    ):
        run_on_all_ranks(ALONE, "step-1 could not be saved", fail)
