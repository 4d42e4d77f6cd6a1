"""The batch script of a job under Slurm, and its submission."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import require_shell_safe
from dist_moe.launch.command import LaunchError, threads_per_worker, worker_arguments

SUBMIT_LIMIT_S = 60.0
CARRIED = ("HOME", "LANG", "PATH", "USER")
"""Variables that a job is given of its submitter's, beside those of `cluster.environment`."""

SCRIPT = """\
#!/bin/bash
# Trains {config_path} on {nodes} nodes with {tasks} workers each.
{directives}
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={port}
{exports}
cd {folder}
mkdir -p {logs}

# Ahead of the time limit: the workers are told, and what they leave unfinished is queued again.
again=0
workers=
before_the_limit() {{
    again=1
    kill -USR1 "$workers" || true
}}
trap before_the_limit USR1

srun --export=ALL --kill-on-bad-exit=1 --label \\
    {worker} &
workers=$!
code=0
wait "$workers" || code=$?
if [ "$again" = 1 ]; then
    # The first wait ended with the signal; this one is for the workers.
    code=0
    wait "$workers" || code=$?
    if [ "$code" != 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""


def slurm_script(
    config: Config, config_path: str | Path, overrides: Sequence[str] = (), folder: str | None = None
) -> str:
    """The script for `sbatch`: one task for each worker; the first node is where they meet.

    Nothing in it is left unquoted. LaunchError for a run.dir that a #SBATCH line cannot hold.
    """
    slurm, run_dir = config.slurm, Path(config.run.dir)
    require_shell_safe("a #SBATCH line", [str(run_dir)])
    options = {
        "job-name": slurm.job_name,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.tasks_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.minutes,
        "output": run_dir / "logs" / "slurm-%j.log",
        "open-mode": "append",
        # What else the submitter's environment holds stays there.
        "export": ",".join([*CARRIED, *config.cluster.environment]),
        "signal": f"B:USR1@{slurm.signal_s}" if slurm.signal_s else None,
        "requeue": "",
    }
    lines = [
        f"#SBATCH --{name}{f'={value}' if value != '' else ''}" for name, value in options.items() if value is not None
    ]
    variables = {"PYTHONSAFEPATH": "1"}
    if slurm.cpus_per_task or isinstance(config.run.threads, int):
        threads = slurm.cpus_per_task or threads_per_worker(config.run.threads, slurm.tasks_per_node)
        variables["OMP_NUM_THREADS"] = str(threads)
    interface = config.cluster.interface
    if interface:
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    worker = (config.cluster.python or sys.executable, "-m", "dist_moe", *worker_arguments(config_path, overrides))
    return SCRIPT.format(
        config_path=str(config_path).replace("\n", " "),
        nodes=slurm.nodes,
        tasks=slurm.tasks_per_node,
        directives="\n".join(lines),
        port=config.cluster.port,
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        folder=shlex.quote(config.cluster.folder or folder or os.getcwd()),
        logs=shlex.quote(str(run_dir / "logs")),
        worker=shlex.join(worker),
    )


def submit(config: Config, script: str) -> str:
    """Hand the script to `sbatch` -> what it says, with the number of the job. LaunchError where it refuses."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "--launcher slurm needs sbatch, not found on PATH; log in to a host of the cluster, or --dry-run"
        )
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = Path(config.run.dir) / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    try:
        told = subprocess.run(
            ["sbatch", str(path)], capture_output=True, text=True, timeout=SUBMIT_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"sbatch does not answer within {SUBMIT_LIMIT_S:g} s; see `sinfo`, and try again") from None
    if told.returncode != 0:
        raise LaunchError(f"sbatch refused {path}: {told.stderr.strip() or told.stdout.strip()}")
    return told.stdout.strip()
