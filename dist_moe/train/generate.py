"""Generates text from a checkpoint."""

from pathlib import Path

import torch

from dist_moe.checkpoint.format.hf_weights import load_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.train.evaluate import model_folder


def generate(checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """Return `prompt` continued by up to `tokens` tokens; generation ends at the end token.

    Args:
        checkpoint: A step-NNNNNN folder, or its folder `model`.
        prompt: The text to continue.
        tokens: The largest number of tokens to add.
        temperature: Sampling temperature; 0 takes the most likely token each time.
        seed: Seed of the sampling.

    Raises:
        WeightsError: The folder is not a checkpoint.
    """
    folder = model_folder(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_weights(folder, Mesh(world_size=1, rank=0, expert_parallel=1)).eval()
    ids = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.end_id]], dtype=torch.int64)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        continued = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.end_id,
            **sampling,
        )
    return prompt + tokenizer.decode(int(token) for token in continued[0, ids.shape[1] :] if token != tokenizer.end_id)
