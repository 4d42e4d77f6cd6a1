"""The command line: each command loads what it is given and calls one function; heavy imports come late."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dist_moe.cli.checkpoint import checkpoint_app
from dist_moe.cli.doctor import doctor, name_accelerator, run_doctor_worker
from dist_moe.cli.launchers import Launcher, Runner
from dist_moe.cli.options import CheckpointFolder, ConfigFile, Overrides, Workers, print_error, report_user_errors
from dist_moe.cli.study import study_app

app = typer.Typer(
    help="Trains Mixture-of-Experts models on many workers, with balanced experts and no auxiliary loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The text that models learn from.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(checkpoint_app, name="checkpoint")


def main() -> None:
    """Run the command line, or exit with code 2 and a remedy if another distribution has replaced `dist_moe`."""
    if foreign := foreign_package():
        print(foreign, file=sys.stderr)
        raise SystemExit(2)
    app(prog_name="dist-moe")


def foreign_package() -> str | None:
    """Return what is wrong with the `dist_moe` that Python imports: value, rule and remedy; None if it is ours.

    The distribution `dist-moe` on PyPI imports under the same name. Installed beside ours it overwrites our
    `__init__.py`, and uninstalled again it takes our files with it.
    """
    package = importlib.import_module("dist_moe")
    if getattr(package, "DISTRIBUTION", None) == "dist-moe-train":
        return None
    return (
        f"dist_moe at {package.__file__} belongs to another distribution; the command dist-moe needs the dist_moe of "
        "dist-moe-train. Run `pip uninstall dist-moe`, then in the checkout of dist-moe-train `pip install "
        "--force-reinstall --no-deps -e .`; if a folder on PYTHONPATH holds another dist_moe, remove it from there"
    )


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: Annotated[Launcher, typer.Option(help="The program that starts the workers.")] = Launcher.deepspeed,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers on this host (2), where the file names no cluster.")
    ] = None,
    runner: Annotated[Runner, typer.Option(help="How the deepspeed launcher reaches several hosts.")] = Runner.pdsh,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of failed workers, by torchrun.")] = 0,
    min_hosts: Annotated[int | None, typer.Option(min=1, help="Hosts to go on with at least, by torchrun.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the commands, and stop.")] = False,
) -> None:
    """Train on several workers of this host, or of the hosts in the file; Ctrl-C ends them all."""
    from dist_moe.config import load_config
    from dist_moe.launch.cluster import read_cluster
    from dist_moe.launch.job import Job

    with report_user_errors():
        settings = load_config(config, overrides or ())
        cluster = read_cluster(settings.cluster)
        job = Job(settings, config, overrides or (), launcher, cluster, workers, runner, max_restarts, min_hosts)
        # Costs the import of the model's config class, a few seconds; in return no process starts in vain.
        check(config, overrides, job.workers)
        if launcher in (Launcher.slurm, Launcher.kubernetes):
            print(job.text() if dry_run else job.submit())
            return
        if dry_run:
            print(*job.shown(os.environ), sep="\n")
            return
        outcome = job.run()
    if outcome.message:
        print_error(outcome.message)
    raise typer.Exit(outcome.code)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    local_rank: Annotated[
        int, typer.Option("--local_rank", "--local-rank", hidden=True, help="Ignored; launchers add it.")
    ] = 0,
    findings: Annotated[
        Path | None, typer.Option("--doctor", hidden=True, help="Check instead, and write what is found here.")
    ] = None,
) -> None:
    """Be one worker of a run, or all of it without a launcher."""
    restore_visible_devices()
    from dist_moe.config import load_config, resolve
    from dist_moe.worker.exit import report_failure
    from dist_moe.worker.rank_info import rank_info_from_env

    with report_user_errors():
        rank_info = rank_info_from_env(os.environ)
        settings = load_config(config, overrides or (), rank_info.world_size)
        fork_agent(rank_info.rank, rank_info.world_size, settings.run.dir)
    with report_failure(settings.run.dir, rank_info.rank):
        resolved = resolve(settings, rank_info.world_size)
        name_accelerator(settings.parallel.backend, rank_info)
        if findings is not None:
            run_doctor_worker(resolved, rank_info, findings)
            return
        from dist_moe.train.loop import run

        run(resolved, rank_info)


app.command()(doctor)


@app.command()
def evaluate(checkpoint: CheckpointFolder, overrides: Overrides = None) -> None:
    """Measure a checkpoint on the validation text, and print the result as one JSON object."""
    from dist_moe.train.evaluate import evaluate_checkpoint
    from dist_moe.worker.rank_info import rank_info_from_env

    with report_user_errors():
        result = evaluate_checkpoint(checkpoint, overrides or ())
        if rank_info_from_env(os.environ).rank == 0:
            print(json.dumps(result))


@app.command()
def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to add, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with a checkpoint's model."""
    from dist_moe.train.generate import generate as continue_text

    with report_user_errors():
        print(continue_text(checkpoint, prompt, tokens, temperature, seed))


def print_reference(asked: bool) -> None:
    """Print the configuration reference and stop, if asked; before CONFIG is required."""
    if asked:
        from dist_moe.cli.reference import yaml_text

        print(yaml_text(), end="")
        raise typer.Exit


@app.command("config")
def print_config(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Workers = 1,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            callback=print_reference,
            is_eager=True,
            help="Print every field with its meaning, accepted values and default, and stop; needs no CONFIG.",
        ),
    ] = False,
) -> None:
    """Check a run for a number of workers, and print it with every field filled in."""
    with report_user_errors():
        print(check(config, overrides, workers), end="")


@data_app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Sources; all built-in ones if none is named."),
    ] = None,
) -> None:
    """Fetch sources of text into the cache, and show what is there."""
    from dist_moe.data.cache import cache_folder
    from dist_moe.data.sources import BUILT_IN, fetch_sources

    with report_user_errors():
        records = fetch_sources(names or BUILT_IN, cache_folder())
    table = Table("source", "version", "bytes", "sha256")
    for record in records:
        table.add_row(record.name, record.version, f"{record.bytes:,}", record.sha256)
    Console().print(table)


def check(config: Path, overrides: list[str] | None, workers: int) -> str:
    """The whole configuration as YAML; ConfigError with every rule that it breaks for this many workers."""
    from dist_moe.config import dump_config, load_config, resolve

    return dump_config(resolve(load_config(config, overrides or (), workers), workers).config)


def restore_visible_devices() -> None:
    """Puts CUDA_VISIBLE_DEVICES back, which DeepSpeed's launcher overwrites, before torch reads it."""
    from dist_moe.launch.launchers.deepspeed import KEPT_DEVICES, VISIBLE_DEVICES

    if KEPT_DEVICES in os.environ:
        os.environ[VISIBLE_DEVICES] = os.environ[KEPT_DEVICES]


def fork_agent(rank: int, world_size: int, run_dir: str) -> None:
    """Puts a minder beside this worker if a launch has started it."""
    from dist_moe.launch.supervise.protocol import SCHEME, Rendezvous
    from dist_moe.worker.contract import LAUNCH_VARIABLE

    launch = os.environ.get(LAUNCH_VARIABLE, "")
    if launch.startswith(SCHEME):
        from dist_moe.launch.supervise.agent import fork_worker

        fork_worker(Rendezvous.parse(launch), rank, world_size, Path(run_dir))
