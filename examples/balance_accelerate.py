"""Balance a Hugging Face MoE model in a training loop of accelerate.

Usage: accelerate launch --num_processes 2 examples/balance_accelerate.py MODEL_FOLDER TEXT_FILE [POLICY [RATE]]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_moe

STEPS, MICRO_BATCHES, SEQUENCES, LENGTH = 60, 2, 8, 64


def main(folder: str, text: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps, and print the balance of the experts."""
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(rows, batch_size=SEQUENCES, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    balancer = dist_moe.balance(model, policy, rate=float(rate))
    balancer.attach(accelerator)  # also saves it in accelerator.save_state

    model.train()
    while balancer.steps < STEPS:
        for batch in loader:
            steps = balancer.steps
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            load = balancer.load
            if load is not None and balancer.steps > steps:
                accelerator.print(f"step {load.step}: loss {loss:.3f}, MaxVio {load.max_vio:.3f} "
                                  f"({load.max_vio_floor:.3f}), {sum(load.counts_LE[0])} assignments on "
                                  f"{accelerator.num_processes} ranks", flush=True)  # fmt: skip
            if balancer.steps == STEPS:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
