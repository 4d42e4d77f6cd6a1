"""Train with a loop of your own, around the same step that `dist-moe train` runs.

Usage: torchrun --nproc-per-node 2 examples/custom_loop.py CONFIG [KEY=VALUE]...
"""

import os
import sys

from dist_moe.config import load_config, resolve
from dist_moe.train.loop import micro_batches
from dist_moe.train.schedule import learning_rate_schedule
from dist_moe.train.setup import build_run
from dist_moe.train.step import train_step
from dist_moe.worker.rank_info import rank_info_from_env


def main(path: str, *overrides: str) -> None:
    """Train the run of a configuration file, and print the load of the experts of its first MoE layer."""
    rank_info = rank_info_from_env(os.environ)
    resolved = resolve(load_config(path, overrides), rank_info.world_size)
    schedule = learning_rate_schedule(resolved.config)
    with build_run(resolved, rank_info) as run:
        engine, balancer = run.state.engine, run.state.balancer
        for step in range(run.steps_done + 1, run.config.train.steps + 1):
            batches = [
                run.state.stream.batch(rows.first, rows.count) for rows in micro_batches(resolved, run.mesh, step)
            ]
            record = train_step(engine, balancer, batches, schedule.learning_rate(balancer.steps_taken))
            if rank_info.rank == 0:
                load_E = record.loads[0]
                max_vio = float(load_E.max() / load_E.double().mean() - 1)
                print(f"step {step}: MaxVio {max_vio:.3f}, load of each expert {load_E.tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
