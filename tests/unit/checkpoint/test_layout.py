"""Which checkpoint a run resumes from, what is reported of a damaged one, and which checkpoints are kept."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import CheckpointError, RunChangedError
from dist_moe.checkpoint.format.layout import recover, resolve_path, step_folders
from dist_moe.checkpoint.format.manifest import read_manifest
from dist_moe.checkpoint.resume import find_checkpoint
from dist_moe.engine.train_state import RunData
from dist_moe.train.setup import tokenize
from tests.dist.resumable import tensors
from tests.unit.train.runs import ALONE, CPU, MORE, STATE, WEIGHTS, find, settings, step, train

Damage = Callable[[Path], object]


def flip_bit(path: Path, offset: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_the_newest_checkpoint_is_used_and_latest_names_it(text: Path, run: Path) -> None:
    found = find(text, run)
    assert found is not None and found.folder == step(run, 6) and found.passed_over == ()
    assert (run / "checkpoints/latest").read_text() == "step-000006\n"
    assert find(text, run, "checkpoint.resume=never") is None
    assert find(text, run / "elsewhere") is None
    by_path = find(text, run / "elsewhere", f"checkpoint.resume={step(run, 2)}")
    assert by_path is not None and by_path.counters.step == 2


def replace_by_link(path: Path) -> None:
    """The same content by a symbolic link, which in general may point anywhere."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replace_by_other_step(folder: Path) -> None:
    shutil.copytree(step(folder.parents[1], 4), folder, dirs_exist_ok=True)


DAMAGES: dict[str, tuple[str, Damage]] = {
    "a flipped bit of a weight": (f"{WEIGHTS} was changed", lambda at: flip_bit(at / WEIGHTS)),
    "truncated weights": ("bytes instead of", lambda at: truncate(at / WEIGHTS)),
    "missing weights": (f"{WEIGHTS} is missing", lambda at: (at / WEIGHTS).unlink()),
    "a flipped bit of a moment": (f"{STATE} was changed", lambda at: flip_bit(at / STATE)),
    "weights in place of moments": ("bytes instead of", lambda at: shutil.copy(at / WEIGHTS, at / STATE)),
    "a link in place of a file": ("is missing", lambda at: replace_by_link(at / STATE)),
    "missing manifest": ("has no manifest.json", lambda at: (at / "manifest.json").unlink()),
    "truncated manifest": ("manifest.json cannot be used", lambda at: truncate(at / "manifest.json", 9)),
    "manifest of another step": ("its manifest is that of step 4", replace_by_other_step),
    "missing counters": ("training.json cannot be used", lambda at: (at / "state/training.json").unlink()),
    "an unlisted file": (
        "state/rank-00001.safetensors is not in its manifest",
        lambda at: shutil.copy(at / STATE, at / MORE),
    ),
    "a changed config": ("config.yaml was changed", lambda at: flip_bit(at / "config.yaml", 5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(text: Path, run: Path, damage: str) -> None:
    message, apply = DAMAGES[damage]
    apply(step(run, 6))
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=.*step-000006 cannot be used"):
        find(text, run, f"checkpoint.resume={step(run, 6)}")
    found = find(text, run)
    assert found is not None and found.folder == step(run, 4)
    assert len(found.passed_over) == 1 and "step-000006" in found.passed_over[0] and message in found.passed_over[0]


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_step_one(text: Path, run: Path) -> None:
    for number in (2, 4, 6):
        flip_bit(step(run, number) / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .*step-000002.*start again with checkpoint\.resume=never"
    ):
        find(text, run)


def test_an_incomplete_checkpoint_is_reported_and_removed(text: Path, run: Path) -> None:
    step(run, 6).rename(step(run, 6).with_name("step-000006.partial"))
    found = find(text, run)
    assert found is not None and found.folder == step(run, 4)
    assert "step-000006.partial was incomplete and has been removed" in found.passed_over[0]


def test_recover_undoes_an_interrupted_rename(run: Path) -> None:
    own = run / "checkpoints"
    step(run, 6).rename(own / "step-000006.replaced")
    shutil.copytree(step(run, 4), own / "step-000004.replaced")
    recover(own)
    assert [number for number, _ in step_folders(own)] == [2, 4, 6]
    assert not (own / "step-000004.replaced").exists(), "the new one is complete: the old one is removed"


@pytest.mark.parametrize(
    ("count", "job"), [("SLURM_RESTART_COUNT", "SLURM_JOB_ID"), ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")]
)
def test_a_restarted_job_resumes_whatever_checkpoint_resume_is(
    text: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, job: str
) -> None:
    """Only from its own checkpoints, not from those of another job in the same folder."""
    described = json.loads((run / "run.json").read_text())
    described["world"]["job"] = f"{job}=7"
    (run / "run.json").write_text(json.dumps(described))
    monkeypatch.setenv(count, "1")
    for number, wanted in (("8", None), ("7", 6)):
        monkeypatch.setenv(job, number)
        found = find(text, run, "checkpoint.resume=never")
        assert (found and found.counters.step) == wanted
    override = f"checkpoint.resume={step(run, 2)}"
    elsewhere = find(text, tmp_path / "empty", override)
    assert elsewhere is not None and elsewhere.counters.step == 2, "it has no checkpoint yet"
    monkeypatch.setenv(count, "0")
    first = find(text, run, override)
    assert first is not None and first.counters.step == 2


def test_resuming_from_an_older_checkpoint_archives_newer_ones(text: Path, run: Path) -> None:
    """Otherwise the next start would resume from a step that this run has abandoned."""
    assert find(text, run, f"checkpoint.resume={step(run, 2)}") is not None
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-000002", "step-000004.abandoned-1", "step-000006.abandoned-1"]
    found = find(text, run)
    assert found is not None and found.counters.step == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("run.seed=1", "run.seed was 0 and is 1"),
        ("train.global_batch_size=4", "train.global_batch_size was "),
        ("model.config.hidden_size=32", "model.config.hidden_size was 48 and is 32"),
        ("balance.policy=none", "balance.policy was loss_free and is none"),
        ("train.optimizer=sgd", "train.optimizer was adamw and is sgd"),
        ("data.sequence_length=8", "data.sequence_length was "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_unless_given_by_path(
    text: Path, run: Path, change: str, named: str
) -> None:
    with pytest.raises(RunChangedError) as refused:
        find(text, run, change)
    first, *lines, remedies = str(refused.value).splitlines()
    assert first == f"{step(run, 6)} belongs to another run:" and lines[0].startswith(f"  {named}")
    assert "checkpoint.resume=never" in remedies and "(rank" not in remedies
    opened = change.startswith(("run.seed", "train.global_batch_size", "data.sequence_length"))
    assert (f"checkpoint.resume={step(run, 6)}" in remedies) == opened, "remedies work"
    assert find(text, run, change, f"checkpoint.resume={step(run, 6)}") is not None


def test_fields_outside_the_identity_of_a_run_may_change(text: Path, run: Path) -> None:
    changes = (
        "train.steps=99",
        "train.schedule_steps=null",
        "train.learning_rate=1e-4",
        "train.micro_batch_size=2",
        "parallel.zero_stage=2",
    )
    found = find(text, run, *changes, "train.precision=bf16", "observe.interval=3", "balance.rate=0.1")
    assert found is not None
    told = [str(change) for change in found.changes]
    assert "train.learning_rate was 0.002 and is 0.0001" in told and "train.steps was 6 and is 99" in told
    assert not any(line.startswith("run.dir") for line in told)


def test_every_field_that_differs_is_named(text: Path, run: Path) -> None:
    changes = ("model.config.hidden_size=32", "model.config.num_mtp_layers=0", "train.optimizer=sgd", "run.seed=3")
    with pytest.raises(RunChangedError) as refused:
        find(text, run, *changes)
    assert [line.split()[0] for line in str(refused.value).splitlines() if line.startswith("  ")] == [
        *("run.seed", "model.config.hidden_size", "train.optimizer")
    ]


def test_the_weights_of_another_model_are_refused_with_the_fields_before_the_shapes(text: Path, run: Path) -> None:
    again = ("train.steps=8", "model.config.hidden_size=32", f"checkpoint.resume={step(run, 6)}")
    done = train(text, run.parent / "again", *again)
    assert done.returncode == 2
    told = done.stderr[done.stderr.index(f"{step(run, 6)} holds another model:") :].splitlines()
    assert told[1] == "  model.config.hidden_size was 48 and is 32"
    assert told[2].startswith("restore these values") and "tensors of another shape" in told[3]


def test_a_checkpoint_of_another_text_is_refused(text: Path, run: Path) -> None:
    config = settings(text, run)
    tokenized: RunData = replace(tokenize(config), fingerprint="another")
    with pytest.raises(CheckpointError, match=r"is not the one that .*step-000006 was trained on"):
        find_checkpoint(config, tokenized, ALONE, CPU)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"files": {"../../etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}}, "outside of its folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}}, "outside of its folder"),
        (
            {"files": {"model/x": {"bytes": -1, "xxh3_128": "0" * 32}}},
            r"cannot be used \(files.model/x.bytes=-1 should be greater than or equal to 0\); use another checkpoint$",
        ),
        ({"files": {"model/x": {"bytes": 1, "xxh3_128": "short"}}}, "xxh3_128=short does not have the required form"),
        ({"format": 1}, "has format 1, and this dist-moe reads format 2"),
        ({"format": "1"}, "format=1 should be a whole number"),
        ({"step": 1.5, "files": []}, "step=1.5 should be a whole number and files=\\[\\] should be a mapping"),
        ({"more": 1}, "more is not a known key"),
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, "step": 1, "files": {}} | changed))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_folder_of_damaged_manifests_has_one_remedy(tmp_path: Path) -> None:
    folder = step(tmp_path, 2)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": "x", "files": {}}))
    with pytest.raises(CheckpointError) as caught:
        resolve_path(tmp_path)
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path} can be used: {folder}/manifest.json cannot be used (step=x should be a whole "
        "number); restore one"
    )


def test_keep_last_and_keep_every_decide_what_is_kept(text: Path, made: Path, tmp_path: Path) -> None:
    """Of steps 3 to 7 the newest two and the multiples of 3; the checkpoint of another run is moved away."""
    changes = ("train.steps=7", "checkpoint.interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    shutil.copytree(step(made, 6), step(tmp_path, 60))
    done = train(text, tmp_path, *changes, f"checkpoint.resume={step(made, 2)}")
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["latest", "step-000003", "step-000006", "step-000007"]
    assert step(tmp_path / "earlier-1", 60).is_dir()


def test_a_complete_run_is_only_evaluated_again(text: Path, run: Path) -> None:
    before = tensors(step(run, 6))
    done = train(text, run, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step 6 from {step(run, 6)}" in done.stdout and "validation loss" in done.stdout
    assert tensors(step(run, 6)).keys() == before.keys() and not (run / "earlier-1").exists()


def test_a_path_without_checkpoint_is_reported(text: Path, tmp_path: Path) -> None:
    for folder, rule in (("nowhere", "is not a folder"), ("empty", "has no manifest.json")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = train(text, tmp_path / "run", f"checkpoint.resume={tmp_path}/{folder}")
        assert done.returncode == 2
        assert f"{tmp_path}/{folder} {rule}" in done.stderr and "Traceback" not in done.stderr


def test_run_on_all_ranks_reports_the_rank_that_failed() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=r"step-1 could not be saved: \[Errno 28\] No space left on device \(rank 0\)"
    ):
        run_on_all_ranks(ALONE, "step-1 could not be saved", fail)
