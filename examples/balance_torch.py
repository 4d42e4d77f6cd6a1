"""Balance a Hugging Face MoE model in a plain PyTorch loop with DistributedDataParallel.

Usage: torchrun --nproc-per-node 2 examples/balance_torch.py MODEL_FOLDER TEXT_FILE [POLICY [RATE]]
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_moe

STEPS, MICRO_BATCHES, SEQUENCES, LENGTH = 60, 2, 8, 64


def main(folder: str, text: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps, and print the balance of the experts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]

    whole: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = DistributedDataParallel(whole.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balancer = dist_moe.balance(model, policy, rate=float(rate))
    balancer.attach(optimizer)

    model.train()
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        for _ in range(MICRO_BATCHES):
            starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
            batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.load
        if rank == 0 and load is not None:
            print(f"step {step}: loss {loss:.3f}, MaxVio {load.max_vio:.3f} ({load.max_vio_floor:.3f}), "
                  f"{sum(load.counts_LE[0])} assignments on {ranks} ranks", flush=True)  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
