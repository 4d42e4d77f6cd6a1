"""Fine-tune a Hugging Face MoE model with threshold routing and adaptive expert weights in the Trainer.

Usage: torchrun --nproc-per-node 2 examples/route_trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import dist_moe

STEPS, LENGTH = 60, 64


def main(folder: str, text: str, output: str) -> None:
    """Train for some steps, save, and open what was saved."""
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    data: list[dict[str, Tensor]] = [{"input_ids": row, "labels": row} for row in rows]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dist_moe.route(model, "threshold", threshold=0.4, target_experts_per_token=1.8)
    balancer = dist_moe.balance(model, "adaptive_weight", rate=0.3)
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[balancer.callback(f"{output}/load")])
    trainer.train()
    dist_moe.save_pretrained(model, f"{output}/model")
    load, opened = balancer.load, dist_moe.from_pretrained(f"{output}/model", expert_parallel=1)
    if load is not None and trainer.is_world_process_zero():
        print(
            f"{load.experts_per_token:.2f} experts per token, {type(opened).__name__}, loss {_loss(opened, rows):.3f}",
            flush=True,
        )


@torch.no_grad()
def _loss(model: torch.nn.Module, rows: Tensor) -> float:
    return float(model(input_ids=rows[:64], labels=rows[:64]).loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
