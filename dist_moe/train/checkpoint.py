"""Checkpoints: at step boundaries, one folder each, made beside its place and then renamed."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, dump_config
from dist_moe.data.corpus import Prepared
from dist_moe.model.task import LanguageModelTask
from dist_moe.train.weights import save_weights


def checkpoint_folder(config: Config, step: int) -> Path:
    """Where the checkpoint of `step` lies: run.dir/checkpoints/step-NNNNNN."""
    return Path(config.run.dir) / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(config: Config, task: LanguageModelTask, prepared: Prepared, mesh: Mesh, step: int) -> Path:
    """Save the weights of `step` -> its folder; every rank calls it, and it is complete when the call returns.

    model/ is a Hugging Face folder with its tokenizer, config.yaml the run's config. What resuming needs besides
    (moments, positions, random states) has its place beside model/, in state/, and is not written yet.
    """
    final = checkpoint_folder(config, step)
    partial = final.with_name(final.name + ".partial")
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    save_weights(task.model, mesh, partial / "model", balanced=config.balance.policy not in ("none", "auxiliary"))
    if mesh.rank == 0:
        prepared.tokenizer.save(partial / "model")
        (partial / "config.yaml").write_text(dump_config(config))
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
    if mesh.world_size > 1:
        dist.barrier()
    return final
