"""Distribute the experts of a Hugging Face MoE model over the ranks, balance them, and save one folder.

Usage: torchrun --nproc-per-node 2 examples/parallelize_torch.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

import dist_moe

STEPS, MICRO_BATCHES, SEQUENCES, LENGTH = 60, 2, 8, 64


def main(folder: str, text: str, output: str) -> None:
    """Train for some steps, and print the balance of the experts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]

    part: nn.Module = dist_moe.from_pretrained(folder)  # or dist_moe.parallelize(model), of a model in memory
    model = DistributedDataParallel(part.to(device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balancer = dist_moe.balance(model, "loss_free", rate=0.05)
    balancer.attach(optimizer)

    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        for _ in range(MICRO_BATCHES):
            starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
            batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / MICRO_BATCHES).backward()
        dist_moe.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.load
        if rank == 0 and load is not None:
            print(f"step {step}: loss {loss:.3f}, MaxVio {load.max_vio:.3f} ({load.max_vio_floor:.3f}), "
                  f"{sum(load.counts_LE[0])} assignments on {ranks} ranks", flush=True)  # fmt: skip
    dist_moe.save_pretrained(model, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
