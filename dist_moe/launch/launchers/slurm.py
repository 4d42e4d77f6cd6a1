"""The scheduler Slurm: a batch script, and its submission by `sbatch`."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.files import write_atomically
from dist_moe.launch.cluster import require_shell_safe
from dist_moe.launch.command import LaunchError, threads_per_worker
from dist_moe.launch.launcher import LaunchRequest, Scheduler
from dist_moe.launch.template import (
    ALL_ARGUMENTS,
    fill_template,
    shell_command,
    shell_exports,
    shell_text,
    shell_variable,
)
from dist_moe.worker.network import INTERFACE_VARIABLES

SUBMIT_LIMIT_S = 60.0
FORWARDED = ("HOME", "LANG", "PATH", "USER")
"""Variables of the submitter that a job inherits, besides those of `cluster.environment`."""


class SlurmLauncher(Scheduler):
    """A batch job with one task for each worker, requeued before its time limit."""

    summary = "a Slurm cluster; the job is queued, and requeued before its time limit"
    workers_fields = "slurm.nodes and slurm.tasks_per_node"

    def starts_mpi(self, runner: str | None) -> bool:
        """Return True; srun does, with the right MPI type."""
        return True

    def workers(self, request: LaunchRequest) -> int:
        """Return the number of tasks of the job."""
        return request.config.slurm.nodes * request.config.slurm.tasks_per_node

    def script(self, request: LaunchRequest) -> str:
        """Return the batch script.

        Raises:
            LaunchError: An #SBATCH line cannot hold run.dir.
        """
        run_dir, settings = Path(request.config.run.dir), request.config.cluster
        require_shell_safe("an #SBATCH line", [str(run_dir)])
        worker = (settings.python or sys.executable, "-m", request.module, *request.worker_arguments)
        return batch_script(
            request,
            output=run_dir / "logs" / "slurm-%j.log",
            forwarded=FORWARDED,
            prepare=f"mkdir -p {shlex.quote(str(run_dir / 'logs'))}",
            folder=shlex.quote(settings.folder or os.getcwd()),
            worker=shlex.join(worker),
        )

    def submit(self, request: LaunchRequest, script: str) -> str:
        """Write the script to `run.dir/job.sbatch`, submit it by `sbatch`, and return its answer with the job's number.

        Raises:
            LaunchError: There is no `sbatch`, or it refuses the script.
        """
        if shutil.which("sbatch") is None:
            raise LaunchError(
                "--launcher slurm needs sbatch, which is not on PATH; log in to a host of the cluster, or use --dry-run"
            )
        run_dir = Path(request.config.run.dir)
        # Slurm does not create the folder of the job's output.
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        path = run_dir / "job.sbatch"
        write_atomically(path, script)
        argv = ["sbatch", str(path)]
        try:
            answer = subprocess.run(argv, capture_output=True, text=True, timeout=SUBMIT_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise LaunchError(
                f"sbatch does not answer within {SUBMIT_LIMIT_S:g} s; check `sinfo`, and try again"
            ) from None
        if answer.returncode != 0:
            raise LaunchError(f"sbatch refused {path}: {answer.stderr.strip() or answer.stdout.strip()}")
        return answer.stdout.strip()

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return the script to submit from the folder where relative paths begin."""
        python = shell_variable("PYTHON")
        worker = (python, "-m", "dist_moe", "train", shell_variable("CONFIG"), *request.overrides, ALL_ARGUMENTS)
        text = batch_script(
            request,
            output=Path("slurm-%j.log"),
            forwarded=(*FORWARDED, "CONFIG", "PYTHON"),
            prepare=f"PYTHON=${{PYTHON:-python3}}\nCONFIG=${{CONFIG:-{request.config_path}}}",
            folder=shell_text(shell_variable("SLURM_SUBMIT_DIR")),
            worker=shell_command(worker),
        )
        return {"slurm/job.sbatch": text}


def batch_script(
    request: LaunchRequest, *, output: Path, forwarded: Sequence[str], prepare: str, folder: str, worker: str
) -> str:
    """Return the batch script: one task for each worker, which meet at the first node.

    Args:
        request: The job.
        output: The file of the job's output.
        forwarded: Variables of the submitter that the job inherits, besides those of `cluster.environment`.
        prepare: Shell lines to run in the working folder before the workers start.
        folder: The working folder, quoted for a shell.
        worker: The command of each worker, quoted for a shell.
    """
    slurm, config = request.config.slurm, request.config
    variables = {"PYTHONSAFEPATH": "1"}
    if slurm.cpus_per_task or isinstance(config.run.threads, int):
        threads = slurm.cpus_per_task or threads_per_worker(config.run.threads, slurm.tasks_per_node)
        variables["OMP_NUM_THREADS"] = str(threads)
    if interface := config.cluster.interface:
        variables |= dict.fromkeys(INTERFACE_VARIABLES, interface)
    return fill_template(
        "slurm.sbatch",
        config=str(request.config_path).replace("\n", " "),
        job_name=slurm.job_name,
        nodes=slurm.nodes,
        tasks=slurm.tasks_per_node,
        cpus=slurm.cpus_per_task,
        gpus=slurm.gpus_per_node or None,
        partition=slurm.partition,
        account=slurm.account,
        minutes=slurm.minutes,
        output=output,
        forwarded=",".join([*forwarded, *config.cluster.environment]),
        signal_s=slurm.signal_s or None,
        port=config.cluster.port,
        exports=shell_exports(variables),
        folder=folder,
        prepare=prepare,
        worker=worker,
    )


LAUNCHER = SlurmLauncher()
