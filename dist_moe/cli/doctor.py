"""The command that checks a configuration and its machines before a long run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from dist_moe.cli.launchers import Launcher, Runner
from dist_moe.cli.options import ConfigFile, Overrides, report_user_errors

if TYPE_CHECKING:
    from dist_moe.config import Resolved
    from dist_moe.doctor.finding import Finding
    from dist_moe.worker.rank_info import RankInfo

Json = Annotated[Path | None, typer.Option("--json", help="File for the findings.")]
FINDINGS = "findings.json"


def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: Annotated[Launcher, typer.Option(help="The program that starts the workers.")] = Launcher.deepspeed,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers on this host (2), where the file names no cluster.")
    ] = None,
    runner: Annotated[Runner, typer.Option(help="How the deepspeed launcher reaches several hosts.")] = Runner.pdsh,
    as_json: Json = None,
) -> None:
    """Check CONFIG on its own machines, by workers as a launch would start them: each check passes, or says what to do.

    Nothing of run.dir changes. Exits with 0, with 1 where a check failed, with 2 where the configuration is wrong.
    """
    from dist_moe.config import load_config, resolve
    from dist_moe.doctor.finding import Finding, Outcome, read_json, table, write_json
    from dist_moe.doctor.temporary import temporary_folder
    from dist_moe.launch.cluster import read_cluster
    from dist_moe.launch.command import LaunchError
    from dist_moe.launch.job import Job
    from dist_moe.worker.rank_info import rank_info_from_env

    if rank_info_from_env(os.environ).world_size > 1:
        raise typer.Exit(within_a_job(config, overrides, as_json))
    with report_user_errors():
        settings = load_config(config, overrides or ())
        cluster = read_cluster(settings.cluster)
        if launcher in (Launcher.slurm, Launcher.kubernetes):
            raise LaunchError(
                f"--launcher {launcher} queues jobs; run `dist-moe doctor` within a job of its, by torchrun"
            )
        folder = Path(settings.run.dir) / f"doctor-{os.getpid()}"
        words = [*(overrides or ()), f"run.dir={folder}", f"--doctor={folder / FINDINGS}"]
        apart = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(folder)})})
        job = Job(apart, config, words, launcher, cluster, workers, runner)
        resolve(settings, job.workers)
    findings = [Finding("configuration", Outcome.passed, f"every rule holds for {job.workers} workers")]
    with temporary_folder(folder):
        try:
            outcome = job.run()
            told = "" if outcome.code == 0 else outcome.message or f"exit code {outcome.code}"
        except LaunchError as error:
            told = str(error)
        seen = (folder / FINDINGS).is_file()
        if seen and not told:
            findings.append(Finding("launch", Outcome.passed, f"{job.workers} workers by {launcher}"))
        else:
            told = told or f"rank 0 left no findings in {folder}; share run.dir among the hosts"
            findings.append(Finding("launch", Outcome.failed, told, "mend what it says, and try again"))
        findings += read_json(folder / FINDINGS) if seen else []
    Console().print(table(findings))
    if as_json is not None:
        write_json(findings, as_json)
    raise typer.Exit(failed(findings))


def within_a_job(config: Path, overrides: list[str] | None, as_json: Path | None) -> int:
    """As one of the workers that a launcher has started by hand; rank 0 shows the table -> the exit code."""
    from dist_moe.config import load_config, resolve
    from dist_moe.doctor.checks import run_checks
    from dist_moe.doctor.finding import table, write_json
    from dist_moe.worker.exit import flush_output
    from dist_moe.worker.rank_info import rank_info_from_env

    rank_info = rank_info_from_env(os.environ)
    with report_user_errors():
        resolved = resolve(load_config(config, overrides or ()), rank_info.world_size)
        name_accelerator(resolved.config.parallel.backend, rank_info)
    folder = Path(resolved.config.run.dir) / f"doctor-{os.environ.get('MASTER_PORT', '')}"

    def tell(found: Sequence["Finding"]) -> None:
        Console().print(table(found))
        if as_json is not None:
            write_json(found, as_json)

    def leave(found: Sequence["Finding"]) -> NoReturn:
        flush_output()
        os._exit(failed(found))

    return failed(run_checks(resolved, rank_info, folder, tell, leave))


def failed(findings: Sequence["Finding"]) -> int:
    """The exit code: 1 where a check failed."""
    from dist_moe.doctor.finding import Outcome

    return int(any(finding.outcome is Outcome.failed for finding in findings))


def name_accelerator(backend: str, rank_info: "RankInfo") -> None:
    """Tell DeepSpeed its device before it is imported; it would else choose by itself, or as the launch's host."""
    from dist_moe.comm.init import choose_backend

    os.environ["DS_ACCELERATOR"] = "cuda" if choose_backend(backend, rank_info) == "nccl" else "cpu"


def run_doctor_worker(resolved: "Resolved", rank_info: "RankInfo", findings: Path) -> None:
    """One worker's part; rank 0 writes what was found."""
    from dist_moe.doctor.checks import run_checks
    from dist_moe.doctor.finding import write_json
    from dist_moe.errors import UserError
    from dist_moe.worker.contract import USER_ERROR_CODE
    from dist_moe.worker.exit import end_process

    def tell(found: Sequence["Finding"]) -> None:
        write_json(found, findings)

    def leave(_: Sequence["Finding"]) -> NoReturn:
        # As a failure, so that the launch ends those that are stuck.
        lost = UserError("the workers have lost each other; the check in which that was says more, if it is below")
        end_process(findings.parent, rank_info.rank, lost, USER_ERROR_CODE)

    run_checks(resolved, rank_info, findings.parent / "trial", tell, leave)
