"""The commands that use the model of a checkpoint."""

import json
import os
from typing import Annotated

import typer

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import CheckpointFolder, Overrides, Verbose


def evaluate(checkpoint: CheckpointFolder, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Evaluate a checkpoint on the validation text, and print the result as one JSON object."""
    from dist_moe.train.evaluate import evaluate_checkpoint
    from dist_moe.worker.rank_info import rank_info_from_env

    with report_user_errors():
        result = evaluate_checkpoint(checkpoint, overrides or ())
        if rank_info_from_env(os.environ, alone_in_batch=True).rank == 0:
            print(json.dumps(result))


def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to add, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 selects the most likely token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choices.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Generate text from the checkpoint."""
    from dist_moe.train.generate import generate as continue_text

    # Bytes that the encoding of the environment lacks arrive as surrogates, which no tokenizer takes.
    text = os.fsencode(prompt).decode("utf-8", errors="replace")
    with report_user_errors():
        print(continue_text(checkpoint, text, tokens, temperature, seed))
