"""Balance a Hugging Face MoE model in the Trainer of transformers.

Usage: torchrun --nproc-per-node 2 examples/balance_trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER [POLICY [RATE]]

OUTPUT_FOLDER/load is for TensorBoard: tensorboard --logdir OUTPUT_FOLDER/load
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import dist_moe

STEPS, LENGTH = 60, 64


def main(folder: str, text: str, output: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps, and continue from the last checkpoint in OUTPUT_FOLDER where there is one."""
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    data: list[dict[str, Tensor]] = [{"input_ids": row, "labels": row} for row in rows]

    # The Trainer of transformers 5.17 does not read the experts of a checkpoint, so the model is loaded from it.
    checkpoint = get_last_checkpoint(output) if Path(output).is_dir() else None
    model = AutoModelForCausalLM.from_pretrained(checkpoint or folder, dtype=torch.float32)
    balancer = dist_moe.balance(model, policy, rate=float(rate))
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=30,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[balancer.callback(f"{output}/load")])
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
