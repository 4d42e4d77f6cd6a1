"""Balance a Hugging Face MoE model under the expert parallelism and FSDP2 of transformers (5.24 or newer).

Usage: torchrun --nproc-per-node 2 examples/balance_transformers_ep.py MODEL_FOLDER TEXT_FILE [POLICY [RATE]]
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import dist_moe

STEPS, SEQUENCES, LENGTH = 60, 16, 64


def main(folder: str, text: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps, and print the balance of the experts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]

    parallel = DistributedConfig(fsdp_size=ranks, ep_size=ranks)  # type: ignore[call-arg]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)  # parameters on two meshes
    balancer = dist_moe.balance(model, policy, rate=float(rate))
    balancer.attach(optimizer)

    model.train()
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.load
        if rank == 0 and load is not None:
            print(f"step {step}: loss {loss:.3f}, MaxVio {load.max_vio:.3f} ({load.max_vio_floor:.3f}), "
                  f"{sum(load.counts_LE[0])} assignments on {ranks} ranks", flush=True)  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
