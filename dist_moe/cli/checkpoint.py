"""The commands that look at a checkpoint, examine it, and make one file of its weights."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dist_moe.cli.options import print_error, report_user_errors

checkpoint_app = typer.Typer(
    help="What is inside a checkpoint, whether it is whole, and its weights in one file.", no_args_is_help=True
)
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A step-NNNNNN folder, or a run.dir (its latest), or a Hugging Face folder."
    ),
]


class Dtype(StrEnum):
    """The number formats of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    keep = "keep"


@checkpoint_app.command()
def inspect(
    checkpoint: Checkpoint, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False
) -> None:
    """Show what a checkpoint holds; reads headers, and not the data."""
    from dist_moe.checkpoint.inspect import format_lines, inspect_checkpoint

    with report_user_errors():
        contents = inspect_checkpoint(checkpoint)
        print(json.dumps(contents) if as_json else "\n".join(format_lines(contents)))


@checkpoint_app.command()
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A step-NNNNNN folder, or a run.dir (all of its checkpoints).")
    ],
) -> None:
    """Read all of a checkpoint and list every fault; exits with 1 if there is one, with 2 if it is no checkpoint."""
    from dist_moe.checkpoint.verify import verify_checkpoints

    with report_user_errors():
        verdicts = verify_checkpoints(checkpoint)
    for verdict in verdicts:
        print(verdict.folder, "is damaged" if verdict.faults else "is good", flush=True)
        print(*(f"  checked: {line}" for line in verdict.checked), sep="\n", flush=True)
        for fault in verdict.faults:
            print_error(f"  {fault}")
    raise typer.Exit(int(any(verdict.faults for verdict in verdicts)))


@checkpoint_app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that is made; it must not be there, or be empty.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; fp32 takes those of the optimizer, where they are kept.")
    ] = Dtype.keep,
) -> None:
    """Write a checkpoint's weights into one model.safetensors, with its config and tokenizer."""
    from dist_moe.checkpoint.export import export as write

    with report_user_errors():
        print(f"{write(checkpoint, out, dtype.value)} is exported to {out}")
