"""Generates text from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config
from dist_moe.checkpoint.format.layout import resolve_path, weights_folder
from dist_moe.comm.mesh import Mesh
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.model.head import has_head
from dist_moe.text import counted


@dataclass(frozen=True)
class Continuation:
    """A generated text.

    Attributes:
        text: The prompt and what follows it.
        cut_short: Why it has fewer tokens than were asked for, where the model has no position for more; else "".
    """

    text: str
    cut_short: str = ""


def generate(checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int) -> Continuation:
    """Return `prompt` continued by up to `tokens` tokens; generation ends at the end token or the last position.

    Args:
        checkpoint: As `resolve_path`.
        prompt: The text to continue.
        tokens: The largest number of tokens to add.
        temperature: Sampling temperature; 0 takes the most likely token each time.
        seed: Seed of the sampling.

    Raises:
        CheckpointError, WeightsError: The folder is not a checkpoint, or the prompt takes all positions of the model.
    """
    folder = weights_folder(resolve_path(checkpoint, read=("model/",)))
    if has_head(read_config(folder)[0]):
        raise WeightsError(
            f"{folder} classifies texts and does not generate any; evaluate it with `dist-moe evaluate`, or give the "
            "checkpoint of a language model"
        )
    tokenizer = load_tokenizer(folder)
    model = load_weights(folder, Mesh(world_size=1, rank=0, expert_parallel=1)).eval()
    ids = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.end_id]], dtype=torch.int64)
    positions = model.config.max_position_embeddings
    room = positions - ids.shape[1]
    if room < 1:
        raise WeightsError(
            f"the prompt of {counted(ids.shape[1], 'token')} leaves no room in the model's "
            f"max_position_embeddings={positions}; give one of at most {counted(positions - 1, 'token')}"
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        continued = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(tokens, room),
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.end_id,
            **sampling,
        )
    made = [int(token) for token in continued[0, ids.shape[1] :]]
    cut_short = ""
    if tokens > room and len(made) == room and made[-1] != tokenizer.end_id:
        cut_short = (
            f"stopped after {counted(room, 'token')} of {tokens}: the model has no position after "
            f"max_position_embeddings={positions}"
        )
    return Continuation(prompt + tokenizer.decode(token for token in made if token != tokenizer.end_id), cut_short)
