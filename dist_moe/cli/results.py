"""The commands that use what a run has left: the model of its checkpoint, and its records."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import CheckpointFolder, Verbose, path_argument, path_option

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values of the evaluation, such as data.sources=my.txt."),
]
RunFolders = Annotated[list[Path], path_argument("RUN_DIR...", "Folders of runs; a run may still be in progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
LARGEST_SEED = 2**32 - 1
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures other than 0 by which logits in fp32 can be divided without an overflow, or losing their order."""


def temperature_of(text: str | float) -> float:
    """Parse the temperature of `generate`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value == 0 or COLDEST <= value <= HOTTEST:
        return value
    raise typer.BadParameter(f"{text} is not 0, or {COLDEST:g} to {HOTTEST:g}; give one of these")


def evaluate(
    checkpoint: CheckpointFolder,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a model, with its tokenizer, on its validation text, or on any text by data.sources=[my.txt]."""
    from dist_moe.observe.console import RunConsole
    from dist_moe.observe.record import to_json
    from dist_moe.train.checkpoint_evaluation import evaluate_checkpoint
    from dist_moe.worker.rank_info import rank_info_from_env

    with report_user_errors():
        result = evaluate_checkpoint(checkpoint, overrides or ())
    if rank_info_from_env(os.environ, alone_in_batch=True).rank != 0:
        return
    if as_json:
        print(to_json(result.metrics.as_dict()))
        return
    shown: dict[str, Path | str] = {"checkpoint": result.checkpoint, "text": result.text}
    RunConsole(result.metrics.step).summary(result.metrics, shown, None, result.target_shares)


def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to add, at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(parser=temperature_of, help="0 selects the most likely token each time; or 0.01 to 100.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the random choices.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Generate text from the checkpoint."""
    from dist_moe.train.generate import generate as continue_text

    # Bytes that the encoding of the environment lacks arrive as surrogates, which no tokenizer takes.
    text = os.fsencode(prompt).decode("utf-8", errors="replace")
    with report_user_errors():
        made = continue_text(checkpoint, text, tokens, temperature, seed)
    print(made.text)
    if made.cut_short:
        print(made.cut_short, file=sys.stderr)


def report(
    run_dirs: RunFolders,
    out: Annotated[Path, path_option("FILE", "HTML file to write; replaced if it exists.")] = Path("report.html"),
) -> None:
    """Write one page about a run, or a comparison of up to 8: loss, load, speed, configuration. It opens offline."""
    from dist_moe.observe.report.page import write_page
    from dist_moe.observe.report.runs import read_runs
    from dist_moe.text import format_bytes

    with report_user_errors():
        runs = read_runs(run_dirs)
        size = write_page(out, runs)
    for run in runs:
        sys.stderr.writelines(f"warning: {run.name}: {problem}\n" for problem in run.problems)
    Console().print(f"Report: {out} ({format_bytes(size)})", markup=False, highlight=False, soft_wrap=True)


def compare(run_dirs: RunFolders, as_json: AsJson = False) -> None:
    """Compare the results and the configurations of two or more runs, and say what is not comparable."""
    from dist_moe.errors import UserError
    from dist_moe.observe.report.runs import read_runs
    from dist_moe.observe.report.terminal import comparison, comparison_values

    with report_user_errors():
        if len(run_dirs) < 2:
            raise UserError(f"{run_dirs[0]} is one run; name two or more to compare, or use dist-moe report for one")
        runs = read_runs(run_dirs)
    if as_json:
        print(json.dumps(comparison_values(runs)))
        return
    console = Console()
    for part in comparison(runs):
        console.print(part)
