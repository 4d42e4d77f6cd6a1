"""One rank of a Trainer under DeepSpeed with a balanced model; writes the load of each step.

Usage: torchrun --nproc-per-node 2 --module tests.dist.deepspeed_trainer FOLDER STAGE [NAN_STEP]

The run resumes from the last checkpoint in FOLDER where there is one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import dist_moe
from dist_moe.attach.load import Load
from tests.attached import EXPERTS, make_model, tokens

STEPS, LENGTH, SEQUENCES, MICRO_BATCHES, RATE = 30, 24, 4, 2, 0.05


class PoisonedTrainer(Trainer):
    """A Trainer whose loss is NaN on rank 1 in one step.

    Attributes:
        nan_step: The step; 0 for none.
    """

    nan_step = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of the Trainer, times NaN in that step."""
        loss: Any = super().compute_loss(*args, **kwargs)
        poisoned = torch.is_grad_enabled() and self.args.process_index == 1
        return loss * float("nan") if poisoned and self.state.global_step + 1 == self.nan_step else loss


def settings(stage: int) -> dict[str, Any]:
    """The configuration of DeepSpeed."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def uneven_model() -> nn.Module:
    """A small Qwen3-MoE whose routers prefer the last experts for every token."""
    model: Any = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.05)  # 2.5 times their standard deviation
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(0.2).add_(torch.linspace(-0.02, 0.02, EXPERTS)[:, None])
    return model


def main(folder: str, stage: str, nan_step: str = "0") -> None:
    """Train, and write `loads-RANK.json` into the folder."""
    deepspeed.ops.__compatible_ops__.clear()  # or it compiles collectives of its own for CPUs, which takes minutes
    # On CPUs accelerate makes no distributed state for DeepSpeed by itself: with ACCELERATE_USE_CPU it takes DDP in its
    # place, and without it every rank is rank 0 of one.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=settings(int(stage)),
        accelerator_config={"use_configured_state": True},
        max_steps=STEPS,
        per_device_train_batch_size=SEQUENCES,
        per_device_eval_batch_size=SEQUENCES,
        gradient_accumulation_steps=MICRO_BATCHES,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=STEPS // 2,
        eval_strategy="steps",
        eval_steps=5,
        report_to="none",
        disable_tqdm=True,
    )
    model = uneven_model()
    balancer = dist_moe.balance(model, rate=RATE)
    loads: list[Load] = []
    balancer.listen(loads.append)
    rows = [{"input_ids": row, "labels": row} for row in tokens(0, 512, LENGTH)]
    trainer = PoisonedTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:20], callbacks=[balancer.callback(f"{folder}/load")]
    )
    trainer.nan_step = int(nan_step)
    checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    written = [
        {
            "step": load.step,
            "taken": load.taken,
            "max_vio": load.max_vio,
            "counts": load.counts_LE,
            "biases": [bias.tolist() for bias in load.biases if bias is not None],
        }
        for load in loads
    ]
    path = Path(folder) / f"loads-{arguments.process_index}.json"
    path.write_text(json.dumps({"loads": written, "engine": type(trainer.model_wrapped).__name__}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
