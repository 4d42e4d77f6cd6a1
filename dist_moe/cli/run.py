"""The commands that run a training job, and one worker of it."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_moe.cli.config import check_before_start, check_config, files_violations, print_notices
from dist_moe.cli.doctor import run_doctor_worker, set_accelerator
from dist_moe.cli.messages import is_verbose, report_user_errors, styled_error
from dist_moe.cli.options import (
    DEFAULT_LAUNCHER,
    AskedWorkers,
    ConfigFile,
    LauncherName,
    Overrides,
    Runner,
    Verbose,
    path_option,
)
from dist_moe.status import print_status
from dist_moe.text import counted

if TYPE_CHECKING:
    from dist_moe.launch.job import Job
    from dist_moe.launch.launcher import LaunchRequest


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherName = DEFAULT_LAUNCHER,
    workers: AskedWorkers = None,
    runner: Runner = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of failed workers (torchrun).")] = 0,
    min_hosts: Annotated[
        int | None, typer.Option(min=1, help="Number of hosts that the job needs at least (torchrun).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the commands, and stop.")] = False,
    write: Annotated[
        Path | None,
        path_option("FOLDER", "Write scripts for every launcher into FOLDER, and stop."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train on several workers of this host, or of the hosts in CONFIG.

    Ctrl-C saves a checkpoint and stops; a second one ends every process at once.
    """
    runs = not dry_run and write is None
    if runs:
        print_status(f"checking {config}")
    from dist_moe.config import load_config
    from dist_moe.launch.cluster import read_cluster
    from dist_moe.launch.job import Job
    from dist_moe.launch.launcher import LaunchRequest, Scheduler, load_launcher
    from dist_moe.launch.supervise.output import print_within

    with report_user_errors():
        reads_here = not isinstance(load_launcher(launcher), Scheduler)
        settings = load_config(config, overrides or (), workers, files_violations if reads_here else None)
        worker_overrides = [*(["--verbose"] if is_verbose() else []), *(overrides or ())]
        cluster = read_cluster(settings.cluster, None if write else os.environ)
        request = LaunchRequest(settings, config, worker_overrides, cluster, workers, runner, max_restarts, min_hosts)
        if write is not None:
            write_scripts(write, request, dry_run)
            return
        job = Job(launcher, request)
        if runs and not job.submits and cluster is None:
            # The workers of this host begin with the whole check, which imports torch; one import fewer before they do.
            check_before_start(settings, job.workers)
        else:
            check_config(config, overrides, job.workers, check_files=job.runs_here, notices=dry_run or job.submits)
        if dry_run:
            print(*job.dry_run(os.environ), sep="\n")
            return
        if job.submits:
            print(job.submit())
            return
        print_status(starting_line(job))
        outcome = job.run()
    if outcome.message:
        print_within("stderr", styled_error(outcome.message))
    raise typer.Exit(outcome.code)


def write_scripts(folder: Path, request: "LaunchRequest", dry_run: bool) -> None:
    """Write scripts for every launcher into a folder, and print where they are.

    Raises:
        LaunchError: A dry run was asked for, too.
    """
    from dist_moe.launch.command import LaunchError
    from dist_moe.launch.scripts import all_files, write_files

    if dry_run:
        raise LaunchError("--dry-run writes nothing, and --write writes files; remove one of them")
    write_files(folder, all_files(request))
    print(f"scripts for every launcher are in {folder}; {folder / 'README.md'} says which to take")


def starting_line(job: "Job") -> str:
    """Return what the launch says before it starts the workers."""
    cluster, launcher = job.request.cluster, job.name
    workers = f"starting {counted(job.workers, 'worker')} by {launcher}; logs: {job.request.config.run.dir}/logs"
    return workers if cluster is None else f"checking {counted(len(cluster.hosts), 'host')}, then {workers}"


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    local_rank: Annotated[
        int, typer.Option("--local_rank", "--local-rank", hidden=True, help="Ignored; launchers add it.")
    ] = 0,
    findings: Annotated[
        Path | None,
        path_option("FILE", "Run the checks instead, and write the findings here.", "--doctor", hidden=True),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run one training worker, or a single-process run."""
    restore_visible_devices()
    from dist_moe.config import load_config, resolve
    from dist_moe.interpreter import without_collections
    from dist_moe.train.data_check import data_violations
    from dist_moe.worker.contract import LAUNCH_VARIABLE
    from dist_moe.worker.exit import report_failure
    from dist_moe.worker.rank_info import rank_info_from_env
    from dist_moe.worker.run_lock import lock_for_worker

    with report_user_errors():
        rank_info = rank_info_from_env(os.environ)
        # The launch has checked already.
        further_check = None if os.environ.get(LAUNCH_VARIABLE) else data_violations
        settings = load_config(config, overrides or (), rank_info.world_size, further_check)
        launched = fork_agent(rank_info.rank, rank_info.world_size, settings.run.dir)
        lock = ExitStack()
        lock.enter_context(lock_for_worker(Path(settings.run.dir), rank_info.rank, launched))
        if rank_info.rank == 0:
            print_status("loading torch and transformers, and checking the model")
    with lock, report_failure(settings.run.dir, rank_info.rank):
        with without_collections():
            resolved = resolve(settings, rank_info.world_size, further_check)
            print_notices(resolved)
            set_accelerator(settings.parallel.backend, rank_info)
            from dist_moe.train.loop import run
        if findings is not None:
            run_doctor_worker(resolved, rank_info, findings)
            return
        run(resolved, rank_info)


def restore_visible_devices() -> None:
    """Restore CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher overwrites, before torch reads it."""
    from dist_moe.worker.contract import KEPT_DEVICES_VARIABLE, VISIBLE_DEVICES_VARIABLE

    if KEPT_DEVICES_VARIABLE in os.environ:
        os.environ[VISIBLE_DEVICES_VARIABLE] = os.environ[KEPT_DEVICES_VARIABLE]


def fork_agent(rank: int, world_size: int, run_dir: str) -> bool:
    """Continue in a child process that an agent watches, and return True, if a launch has started this worker."""
    from dist_moe.launch.supervise.protocol import Rendezvous
    from dist_moe.launch.supervise.secret_file import restart_with_variables
    from dist_moe.worker.contract import LAUNCH_VARIABLE, PROCESS_IDENTITY

    launch = os.environ.get(LAUNCH_VARIABLE, "")
    if not launch:
        os.environ.pop(LAUNCH_VARIABLE, None)
        return False
    restart_with_variables(os.environ)
    if PROCESS_IDENTITY.fullmatch(launch):
        return False
    from dist_moe.launch.supervise.agent import fork_worker

    fork_worker(Rendezvous.parse(launch), rank, world_size, Path(run_dir))
    return True
