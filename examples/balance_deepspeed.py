"""Balance a Hugging Face MoE model in a loop of DeepSpeed, at ZeRO stage 0, 1, 2 or 3.

Usage: torchrun --nproc-per-node 2 examples/balance_deepspeed.py MODEL_FOLDER TEXT_FILE STAGE OUTPUT [POLICY [RATE]]
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_moe

STEPS, MICRO_BATCHES, SEQUENCES, LENGTH = 60, 2, 8, 64


def main(folder: str, text: str, stage: str, output: str, policy: str = "loss_free", rate: str = "0.05") -> None:
    """Train for some steps, save a checkpoint, and print the balance of the experts."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__.clear()  # or it compiles collectives of its own for CPUs, which takes minutes
    deepspeed.init_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    balancer = dist_moe.balance(engine, policy, rate=float(rate))
    balancer.attach(engine)  # also saves it in engine.save_checkpoint

    engine.train()
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        for _ in range(MICRO_BATCHES):
            starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
            batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(engine.device)
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
        load = balancer.load
        if rank == 0 and load is not None:
            print(f"step {step}: loss {loss:.3f}, MaxVio {load.max_vio:.3f} ({load.max_vio_floor:.3f}), "
                  f"{sum(load.counts_LE[0])} assignments on {ranks} ranks", flush=True)  # fmt: skip
    engine.save_checkpoint(output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
