"""Balance a Hugging Face MoE model in the SFTTrainer of TRL.

Usage: torchrun --nproc-per-node 2 examples/balance_trl.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER [POLICY [RATE]]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dist_moe


def main(folder: str, text: str, output: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps on the paragraphs of a text."""
    paragraphs = [paragraph for paragraph in Path(text).read_text().split("\n\n") if len(paragraph) > 100]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    balancer = dist_moe.balance(model, policy, rate=float(rate))
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=output,
            max_steps=60,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=60,
            max_length=64,
            router_aux_loss_coef=0.0,  # the balancer takes the place of the auxiliary loss
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": paragraphs}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[balancer.callback()],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
