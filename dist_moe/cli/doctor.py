"""The command that checks a configuration and its machines before a long run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from dist_moe.cli.messages import is_verbose, report_user_errors
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
from dist_moe.text import counted

if TYPE_CHECKING:
    from dist_moe.config import Resolved
    from dist_moe.doctor.finding import Finding
    from dist_moe.worker.rank_info import RankInfo

Json = Annotated[Path | None, path_option("FILE", "File for the findings.", "--json")]
FINDINGS = "findings.json"


def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherName = DEFAULT_LAUNCHER,
    workers: AskedWorkers = None,
    runner: Runner = None,
    as_json: Json = None,
    verbose: Verbose = False,
) -> None:
    """Check CONFIG on its machines, with workers started as for training, and print a remedy for each failed check.

    Does not change run.dir. Exits with 0, with 1 where a check failed, with 2 where the configuration is wrong.
    """
    from dist_moe.config import load_config, resolve
    from dist_moe.doctor.finding import Finding, Outcome, read_json
    from dist_moe.doctor.temporary import temporary_folder
    from dist_moe.errors import UserError
    from dist_moe.files import try_file
    from dist_moe.launch.cluster import read_cluster
    from dist_moe.launch.command import LaunchError
    from dist_moe.launch.job import Job
    from dist_moe.launch.launcher import LaunchRequest
    from dist_moe.train.data_check import data_violations
    from dist_moe.worker.rank_info import rank_info_from_env

    with report_user_errors():
        if as_json is not None:
            try_file(as_json, "--json")
        within = rank_info_from_env(os.environ, alone_in_batch=True).world_size > 1
    if within:
        raise typer.Exit(within_a_job(config, overrides, as_json))
    with report_user_errors():
        settings = load_config(config, overrides or (), workers, data_violations)
        cluster = read_cluster(settings.cluster, os.environ)
        folder = Path(settings.run.dir) / f"doctor-{os.getpid()}"
        arguments = [*(overrides or ()), f"run.dir={folder}", f"--doctor={folder / FINDINGS}"]
        arguments += ["--verbose"] if is_verbose() else []
        in_folder = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(folder)})})
        job = Job(launcher, LaunchRequest(in_folder, config, arguments, cluster, workers, runner))
        if job.submits:
            raise LaunchError(f"--launcher {launcher} queues jobs; run `dist-moe doctor` by torchrun inside of a job")
        resolve(settings, job.workers, data_violations if job.runs_here else None)
    findings = [Finding("configuration", Outcome.passed, f"every rule holds for {counted(job.workers, 'worker')}")]
    with temporary_folder(folder):
        try:
            outcome = job.run()
            fault = "" if outcome.code == 0 else outcome.message or f"exit code {outcome.code}"
        except UserError as error:
            fault = str(error)
        written = (folder / FINDINGS).is_file()
        if written and not fault:
            findings.append(Finding("launch", Outcome.passed, f"{counted(job.workers, 'worker')} by {launcher}"))
        else:
            fault = fault or f"rank 0 wrote no findings to {folder}; share run.dir among the hosts"
            findings.append(Finding("launch", Outcome.failed, fault, "fix this fault, and run the doctor again"))
        findings += read_json(folder / FINDINGS) if written else []
    show(findings, as_json)
    raise typer.Exit(failed(findings))


def show(findings: Sequence["Finding"], as_json: Path | None) -> None:
    """Print the table of the findings, and write them to the file of --json, if there is one."""
    from dist_moe.doctor.finding import table, write_json
    from dist_moe.errors import needs_folder

    Console().print(table(findings))
    if as_json is not None:
        with report_user_errors(), needs_folder(as_json, "--json", "file"):
            write_json(findings, as_json)


def within_a_job(config: Path, overrides: list[str] | None, as_json: Path | None) -> int:
    """Run the checks as one of the workers that a launcher has started by hand.

    Rank 0 prints the table. Returns the exit code.
    """
    from dist_moe.config import load_config, resolve
    from dist_moe.doctor.checks import run_checks
    from dist_moe.train.data_check import data_violations
    from dist_moe.worker.exit import flush_output
    from dist_moe.worker.rank_info import rank_info_from_env

    rank_info = rank_info_from_env(os.environ, alone_in_batch=True)
    with report_user_errors():
        settings = load_config(config, overrides or (), rank_info.world_size, data_violations)
        resolved = resolve(settings, rank_info.world_size, data_violations)
        set_accelerator(resolved.config.parallel.backend, rank_info)
    folder = Path(resolved.config.run.dir) / f"doctor-{os.environ.get('MASTER_PORT', '')}"

    def report(found: Sequence["Finding"]) -> None:
        show(found, as_json)

    def leave(found: Sequence["Finding"]) -> NoReturn:
        flush_output()
        os._exit(failed(found))

    return failed(run_checks(resolved, rank_info, folder, report, leave))


def failed(findings: Sequence["Finding"]) -> int:
    """Return the exit code: 1 if a check failed."""
    from dist_moe.doctor.finding import Outcome

    return int(any(finding.outcome is Outcome.failed for finding in findings))


def set_accelerator(backend: str, rank_info: "RankInfo") -> None:
    """Set the device of DeepSpeed before it is imported; by default it selects one that may not fit the backend."""
    from dist_moe.comm.devices import choose_backend

    os.environ["DS_ACCELERATOR"] = "cuda" if choose_backend(backend, rank_info) == "nccl" else "cpu"


def run_doctor_worker(resolved: "Resolved", rank_info: "RankInfo", findings: Path) -> None:
    """Run the checks as one worker of a launch; rank 0 writes the findings to a file."""
    from dist_moe.doctor.checks import run_checks
    from dist_moe.doctor.finding import write_json
    from dist_moe.errors import UserError
    from dist_moe.worker.contract import USER_ERROR_CODE
    from dist_moe.worker.exit import end_process

    def report(found: Sequence["Finding"]) -> None:
        write_json(found, findings)

    def leave(_: Sequence["Finding"]) -> NoReturn:
        # Fails, so that the launch ends the workers that hang.
        lost = UserError("the process group broke; see the failed check below")
        end_process(findings.parent, rank_info.rank, lost, USER_ERROR_CODE)

    run_checks(resolved, rank_info, findings.parent / "trial", report, leave)
