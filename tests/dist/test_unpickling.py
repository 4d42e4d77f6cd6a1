"""In a run nothing that another rank sends is unpickled, and its files are copied to their folder alone."""

import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed import distributed_c10d

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.file_transfer import FileTransfer, broadcast_files
from dist_moe.checkpoint.verify import verify_checkpoints
from dist_moe.comm.mesh import Mesh
from tests.dist.pool import RankPool
from tests.dist.resumable import steps, train, write_text


class Refused(pickle.Unpickler):
    """Unpickles nothing."""

    def load(self) -> object:
        raise AssertionError("something that another rank sent is unpickled")


def trained(rank: int, world_size: int, text: Path, folder: Path) -> None:
    """Train, save, stop and resume, on two hosts without shared storage."""
    settings: tuple[str, ...] = (
        "checkpoint.interval=1",
        "observe.replica_check_interval=1",
        "cluster.shared_storage=false",
    )
    with (
        patch.object(distributed_c10d, "_unpickler", Refused),
        patch("dist_moe.checkpoint.file_transfer.hosts_of_ranks", lambda: ["first", "second"]),
    ):
        for last in (1, 2):
            train(rank, world_size, text, folder / str(rank), (*settings, f"train.steps={last}"))
        kept = folder / "fetched" / "step-000002"
        if rank == 0:
            shutil.copytree(folder / "0" / "checkpoints" / kept.name, kept)
        train(
            rank, world_size, text, folder / f"again{rank}", (*settings, "train.steps=3", f"checkpoint.resume={kept}")
        )


def test_a_run_with_a_save_and_a_resume_unpickles_nothing_of_another_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(trained, 2, write_text(tmp_path), tmp_path)
    saved = tmp_path / "0" / "checkpoints" / "step-000002"
    assert (saved / "state" / "rank-00001.safetensors").is_file()  # from the second host
    assert steps(tmp_path / "0").keys() == {1, 2} and steps(tmp_path / "again0").keys() == {3}
    (verdict,) = verify_checkpoints(tmp_path / "fetched" / "step-000002")
    assert not verdict.faults, "copies alone are deleted, whatever a folder is named"


@pytest.mark.parametrize("name", ["../profile", "/etc/profile", "state/../../profile", "..", ""])
def test_a_file_of_another_rank_is_written_below_the_checkpoint_alone(name: str, tmp_path: Path) -> None:
    transfers = [FileTransfer("state/training.json", 1, 0), FileTransfer(name, 1, 0)]
    with pytest.raises(CheckpointError, match="names files outside of the checkpoint's folder"):
        broadcast_files(transfers, Mesh(2, 1, 1), torch.device("cpu"), tmp_path, tmp_path / "copy")
    assert not list(tmp_path.iterdir())
