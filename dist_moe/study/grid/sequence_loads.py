"""Counts the routing of a trained model by sequence and by domain, on its held-out text.

A computation batch is what the experts compute in one go: the micro-batches of all ranks of an expert-parallel group.
Its MaxVio decides how long the slowest rank computes. It is found here for any group size by joining the counts of
sequences (Wang et al. 2024, arXiv 2408.15664, section 5.1 and figure 4, argue with it).

Shapes: N sequences, L MoE layers, E experts, D domains.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_moe.balancing.load import mean_max_vio
from dist_moe.checkpoint.format.hf_weights import load_weights
from dist_moe.checkpoint.format.layout import resolve_path, weights_folder
from dist_moe.comm.init import init_distributed
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import load_stored_config
from dist_moe.data.cache import cache_folder
from dist_moe.data.corpus import Corpus, TokenizedData, prepare
from dist_moe.data.stream import PADDING, Stream
from dist_moe.model.attention import documents_arguments
from dist_moe.model.inputs import ModelInputs, model_inputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.worker.rank_info import rank_info_from_env

GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64)
SEED = 0
FORWARD_SEQUENCES = 16
PERMUTATIONS = 200
TIMEOUT_S = 600.0


class SequenceLoads(NamedTuple):
    """The routing of a model on text.

    Attributes:
        load_NLE: int64 [N, L, E], assignments of each sequence.
        load_CLE: int64 [C, L, E], assignments of the tokens of each document.
        tokens_C: int64 [C], tokens of each document.
        domain_C: int64 [C], the domain of each document.
        domains: The names of the D domains.
    """

    load_NLE: Tensor
    load_CLE: Tensor
    tokens_C: Tensor
    domain_C: Tensor
    domains: tuple[str, ...]

    @property
    def tokens_D(self) -> Tensor:
        """int64 [D], tokens of each domain."""
        return torch.zeros(len(self.domains), dtype=torch.int64).index_add_(0, self.domain_C, self.tokens_C)

    @property
    def documents_D(self) -> Tensor:
        """int64 [D], documents of each domain that have a token."""
        return torch.bincount(self.domain_C[self.tokens_C > 0], minlength=len(self.domains))

    def load_LDE(self, domain_C: Tensor | None = None) -> Tensor:
        """Return the assignments of the tokens of each domain, int64 [L, D, E].

        Args:
            domain_C: The domain of each document, in place of its own.
        """
        layers, experts = self.load_CLE.shape[1:]
        found_DLE = torch.zeros(len(self.domains), layers, experts, dtype=torch.int64)
        return found_DLE.index_add_(0, self.domain_C if domain_C is None else domain_C, self.load_CLE).transpose(0, 1)


def analyze_run(run: Path) -> dict[str, Any]:
    """Count the routing of the last checkpoint of a run on its held-out text, and summarize it.

    Args:
        run: `run.dir`.

    Returns:
        `computation` (see `computation_batches`), `sequences_per_forward`, `domains`, `tokens_by_domain`,
        `documents_by_domain`, `by_domain` ([L][D][E] assignments) and `information_by_chance` ([L] bits, see
        `information_by_chance`).
    """
    checkpoint = resolve_path(run, read=("model/",))
    config = load_stored_config(checkpoint / "config.yaml")
    folder, text = weights_folder(checkpoint), config.data
    # As the run itself prepared it, so that the tokens are those of the cache.
    data = prepare(text.sources, text.tokenizer, text.vocabulary, text.validation_fraction, cache_folder())
    with init_distributed(rank_info_from_env({}, alone_in_batch=True), "gloo", TIMEOUT_S):
        task = LanguageModelTask(load_weights(folder, make_mesh(1)))
        counted = count_sequences(task, data, config.data.sequence_length)
    return {
        "computation": computation_batches(counted.load_NLE, config.train.sequences_per_forward),
        "sequences_per_forward": config.train.sequences_per_forward,
        "domains": list(counted.domains),
        "tokens_by_domain": counted.tokens_D.tolist(),
        "documents_by_domain": counted.documents_D.tolist(),
        "by_domain": counted.load_LDE().tolist(),
        "information_by_chance": information_by_chance(counted),
    }


@torch.no_grad()
def count_sequences(task: LanguageModelTask, data: TokenizedData, length: int) -> SequenceLoads:
    """Count the assignments of each sequence and document of the validation split.

    Args:
        task: The model, in one process.
        data: The text.
        length: Tokens of a sequence.
    """
    stream = Stream(data.validation, length, seed=SEED)
    task.eval()
    domain_C = torch.from_numpy(np.array(data.validation.domains_N, dtype=np.int64))
    layers, experts = len(task.layers), task.layers[0].router.num_experts
    load_NLE = torch.zeros(stream.rows_per_epoch, layers, experts, dtype=torch.int64)
    load_CLE = torch.zeros(len(domain_C), layers, experts, dtype=torch.int64)
    tokens_C = torch.zeros(len(domain_C), dtype=torch.int64)
    for first in range(0, stream.rows_per_epoch, FORWARD_SEQUENCES):
        rows = min(FORWARD_SEQUENCES, stream.rows_per_epoch - first)
        batch = stream.rows_in_file_order(first, rows)
        document_T = documents_of(data.validation, first * length, rows * length)
        sequence_T = torch.arange(first, first + rows).repeat_interleave(length)
        tokens_C += torch.bincount(document_T[document_T >= 0], minlength=len(domain_C))
        for layer, ids_TK in enumerate(_routed_ids(task, model_inputs(batch, torch.device("cpu")))):
            taken_TK = ids_TK >= 0
            experts_A = ids_TK[taken_TK]
            sequence_A = sequence_T[:, None].expand_as(ids_TK)[taken_TK]
            document_A = document_T[:, None].expand_as(ids_TK)[taken_TK]
            load_NLE[:, layer] += _joint_counts(sequence_A, experts_A, load_NLE.shape[0], experts)
            load_CLE[:, layer] += _joint_counts(document_A, experts_A, len(domain_C), experts)
    return SequenceLoads(load_NLE, load_CLE, tokens_C, domain_C, data.validation.domains)


def documents_of(corpus: Corpus, first: int, count: int) -> Tensor:
    """Return the document of each of `count` positions of a text in file order, from `first` on; -1 at padding."""
    at_T = np.arange(first, first + count)
    document_T = np.searchsorted(corpus.starts_N1, at_T, side="right") - 1
    return torch.from_numpy(np.where(at_T < len(corpus.tokens) - 1, document_T, PADDING))


def _routed_ids(task: LanguageModelTask, inputs: ModelInputs) -> list[Tensor]:
    """Run the model; return the experts of each token, [T, K] for each MoE layer, -1 where there is none."""
    mask_T = None if inputs.mask_BS is None else inputs.mask_BS.reshape(-1)
    for layer in task.layers:
        layer.router.open_record(mask_T)
    arguments = documents_arguments(inputs.documents, task.model.config)
    task.model.base_model(input_ids=inputs.tokens_BS, position_ids=inputs.positions_BS, use_cache=False, **arguments)
    return [layer.router.close_record().ids_TK for layer in task.layers]


def _joint_counts(first_A: Tensor, second_A: Tensor, first_size: int, second_size: int) -> Tensor:
    joint_A = first_A * second_size + second_A
    return torch.bincount(joint_A, minlength=first_size * second_size).view(first_size, second_size)


def computation_batches(load_NLE: Tensor, sequences_per_forward: int) -> list[dict[str, float]]:
    """Compute the MaxVio of computation batches for each expert-parallel size that the text is large enough for.

    Sequences are joined in a random order, as training reads them; each is in one batch.

    Args:
        load_NLE: int64 [N, L, E], assignments of each sequence.
        sequences_per_forward: Sequences of a rank's micro-batch.

    Returns:
        For each size: `ranks`, `batches`, `max_vio` (mean over batches and layers), `max_vio_floor` (of the same).
    """
    order_N = torch.from_numpy(np.random.Generator(np.random.PCG64(SEED)).permutation(load_NLE.shape[0]))
    shuffled_NLE = load_NLE[order_N]
    found = []
    for ranks in GROUP_SIZES:
        rows = ranks * sequences_per_forward
        batches = shuffled_NLE.shape[0] // rows
        if batches == 0:
            break
        load_MLE = shuffled_NLE[: batches * rows].unflatten(0, (batches, rows)).sum(dim=1)
        measured = [mean_max_vio(load_ME) for load_ME in load_MLE.unbind(dim=1)]
        value, floor = (math.fsum(column) / len(measured) for column in zip(*measured, strict=True))
        found.append({"ranks": ranks, "batches": batches, "max_vio": round(value, 5), "max_vio_floor": round(floor, 5)})
    return found


def domain_information(load_DE: Tensor) -> tuple[float, float]:
    """Compute the mutual information between the domain of an assignment and its expert, with domains equally likely.

    Args:
        load_DE: int64 [D, E], assignments of each domain to each expert.

    Returns:
        The information in bits, 0 (every domain uses the experts equally) to log2 min(D, E); and its expected value for
        the same numbers of assignments without any relation, (D - 1) (E - 1) / (2 N ln 2) to first order (Miller
        1955), with N the harmonic mean of the domains' assignments times D.
    """
    present_DE = load_DE[load_DE.sum(dim=1) > 0].double()
    domains, experts = present_DE.shape
    if domains < 2:
        return 0.0, 0.0
    totals_D = present_DE.sum(dim=1)
    share_DE = present_DE / totals_D[:, None]
    mean_E = share_DE.mean(dim=0)
    entropy = torch.special.entr(mean_E).sum() - torch.special.entr(share_DE).sum(dim=1).mean()
    size = domains * domains / float((1 / totals_D).sum())
    floor = (domains - 1) * (experts - 1) / (2 * size * math.log(2))
    return max(0.0, float(entropy) / math.log(2)), floor


def information_by_chance(counted: SequenceLoads) -> list[float]:
    """Compute the domain information of documents that belong to the domains by chance.

    Tokens of one document use similar experts in any domain, so a domain of few documents has its own distribution over
    the experts by chance alone; the floor of `domain_information`, of independent tokens, is far below that.

    Returns:
        Its mean over `PERMUTATIONS` random assignments of the documents to the domains, each with as many documents as
        it has, in bits, for each layer.
    """
    generator = torch.Generator().manual_seed(SEED)
    present_C = (counted.tokens_C > 0).nonzero().flatten()
    found: list[list[float]] = []
    for _ in range(PERMUTATIONS):
        domain_C = counted.domain_C.clone()
        domain_C[present_C] = domain_C[present_C[torch.randperm(len(present_C), generator=generator)]]
        found.append([domain_information(load_DE)[0] for load_DE in counted.load_LDE(domain_C)])
    return [round(math.fsum(column) / len(column), 6) for column in zip(*found, strict=True)]
