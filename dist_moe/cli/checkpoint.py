"""The commands that show a checkpoint, verify it, and export its weights."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dist_moe.cli.messages import print_error, report_user_errors
from dist_moe.cli.options import CheckpointFolder, Verbose, path_argument

checkpoint_app = typer.Typer(help="Show, verify and export checkpoints.", no_args_is_help=True)


class Dtype(StrEnum):
    """The number formats of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    keep = "keep"


@checkpoint_app.command()
def inspect(
    checkpoint: CheckpointFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint contains. Reads the headers of its files, not the data."""
    from dist_moe.checkpoint.inspect import format_lines, inspect_checkpoint

    with report_user_errors():
        contents = inspect_checkpoint(checkpoint)
        print(json.dumps(contents) if as_json else "\n".join(format_lines(contents)))


def _change_of_loss(checkpoint: Path) -> str:
    """Say what the selection biases change, measured on the held-out text of the run."""
    from dist_moe.errors import UserError
    from dist_moe.train.checkpoint_evaluation import evaluate_checkpoint

    try:
        found = [evaluate_checkpoint(checkpoint, without_bias=each).metrics for each in (False, True)]
    except UserError as error:
        return f"the selection biases are left out; the change of the loss was not measured: {error}"
    before, after = (metrics.validation_loss for metrics in found)
    return (
        f"the selection biases are left out: the validation loss is {before:.4f} with them and {after:.4f} without, "
        f"MaxVio {found[0].max_vio_global:.2f} and {found[1].max_vio_global:.2f}"
    )


@checkpoint_app.command()
def verify(
    checkpoint: Annotated[
        Path,
        path_argument("CHECKPOINT", "A step-NNNNNN folder, or a run.dir (all of its checkpoints)."),
    ],
    verbose: Verbose = False,
) -> None:
    """Read all of a checkpoint and list every fault. Exits with 1 if there is one, with 2 if it is not a checkpoint."""
    from dist_moe.checkpoint.verify import verify_checkpoints

    with report_user_errors():
        verdicts = verify_checkpoints(checkpoint)
    for verdict in verdicts:
        print(verdict.folder, "is damaged" if verdict.faults else "is intact", flush=True)
        print(*(f"  checked: {line}" for line in verdict.checked), sep="\n", flush=True)
        for fault in verdict.faults:
            print_error(f"  {fault}")
    raise typer.Exit(int(any(verdict.faults for verdict in verdicts)))


@checkpoint_app.command()
def export(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, path_argument("OUT", "Folder to create; must not exist, or be empty.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of the weights; fp32 uses the optimizer's copy, if there is one.")
    ] = Dtype.keep,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write a folder that transformers opens, without selection biases that the family has no place for; "
            "the loss is measured with and without them.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint's weights into one model.safetensors, with its config and tokenizer."""
    from dist_moe.checkpoint.export import export as write
    from dist_moe.checkpoint.format.hf_folder import read_raw_config
    from dist_moe.checkpoint.format.hf_weights import own_type_line
    from dist_moe.config.pretrained import OWN_PREFIX
    from dist_moe.model.head import problem_of

    with report_user_errors():
        exported = write(checkpoint, out, dtype.value, plain)
        print(f"{exported.source} is exported to {out}")
        if exported.notice:
            print(exported.notice)
        if exported.without_bias:
            print(_change_of_loss(exported.source))
        raw = read_raw_config(out)
        model_type: str = raw["model_type"]
    if model_type.startswith(OWN_PREFIX):
        print(own_type_line(model_type.removeprefix(OWN_PREFIX), headed=problem_of(raw) is not None))
