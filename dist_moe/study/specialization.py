"""The study of specialization: which experts take the text of which domain, with and without balancing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.study.grid.claims import Claim, Measure, judge
from dist_moe.study.grid.page import Column, Study, paragraphs
from dist_moe.study.grid.sequence_loads import domain_information
from dist_moe.study.grid.statistics import Results
from dist_moe.study.grid.store import CellResult
from dist_moe.study.tables import format_mean, markdown_table

NONE = "none"
LOSS_FREE = "loss-free, sign 0.005"
AUXILIARY = "auxiliary 1e-2, micro-batch"
MARGIN = 0.02
"""Bits: a loss of domain information below it counts as none."""
LOST = Measure("domain information", 3, " bits")
LARGEST_SHARE = 4.0
"""The end of the color scale, as a multiple of the share under uniform routing."""

INTRODUCTION = """
Balancing forces every expert to take its share of every batch. Does that blur what the experts are good for? The models
of the [study of Loss-Free Balancing](loss_free.md) were trained on text of several domains, and every token of the
held-out text has a domain. For each layer, the *domain information* is the mutual information in bits between the
domain of a token and the expert that it is sent to, with all domains equally likely: 0 if every domain uses the experts
equally, and at most log2 of the number of domains if the expert reveals the domain.
"""
NOTES = """
Counted on the held-out text with the model after the last step, its bias included. The floor is the expected domain
information of the same number of independent assignments without any relation between domain and expert (Miller's
correction). Tokens of one document use similar experts, though, and some domains have few documents of held-out text:
*by chance* is the domain information of the same documents when they are given to the domains at random, mean over 200
drawings. An auxiliary loss per micro-batch asks for balance within a few sequences, which often are of one domain; a
bias that is moved by the load of the global batch asks for balance over all of them.
"""


def information(results: Results, arm: str) -> list[list[tuple[float, float]]]:
    """Return the domain information and its floor, in bits: [seeds][layers]."""
    return [
        [domain_information(torch.tensor(load_DE)) for load_DE in result.loads["by_domain"]]
        for result in results.get("", arm)
        if "by_domain" in result.loads
    ]


def mean_information(results: Results, arm: str) -> dict[int, float]:
    """Return the domain information in bits, mean over layers, by seed."""
    seeds = [result.seed for result in results.get("", arm) if "by_domain" in result.loads]
    layers = information(results, arm)
    return {seed: fmean(bits for bits, _ in by_layer) for seed, by_layer in zip(seeds, layers, strict=True)}


def claims(results: Results) -> list[Claim]:
    """Judge whether balancing lowers the domain information."""
    keeps = f"keeps the domain information of no balancing within {MARGIN} bits"
    return [
        _loss_below(results, f"Loss-free balancing {keeps}", LOSS_FREE, NONE, MARGIN),
        _loss_below(results, f"An auxiliary loss of the micro-batch {keeps}", AUXILIARY, NONE, MARGIN),
        _loss_below(results, "Loss-free balancing keeps more than that auxiliary loss", LOSS_FREE, AUXILIARY, 0.0),
    ]


def _loss_below(results: Results, text: str, arm: str, other: str, limit: float) -> Claim:
    """Claim that `arm` has at most `limit` bits less than `other`."""
    first, second = mean_information(results, arm), mean_information(results, other)
    seeds = sorted(first.keys() & second.keys())
    claim = judge(text, [second[seed] - first[seed] for seed in seeds], LOST, limit)
    if not seeds:
        return claim
    means = f"{fmean(first[seed] for seed in seeds):.3f} and {fmean(second[seed] for seed in seeds):.3f} bits"
    return replace(claim, evidence=f"{means}; lost {claim.evidence}")


def sections(results: Results, folder: Path) -> list[str]:
    """Write the table of domain information and the figure of domain by expert."""
    lines = ["### Domain information", "", "In bits, by MoE layer.", ""]
    rows = []
    for arm in results.arms:
        if by_seed := information(results, arm):
            layers = list(zip(*by_seed, strict=True))
            cells = [format_mean([bits for bits, _ in layer], 3) for layer in layers]
            mean = format_mean([fmean(bits for bits, _ in layer) for layer in by_seed], 3)
            floor = fmean(floor for layer in by_seed for _, floor in layer)
            chance = [fmean(result.loads["information_by_chance"]) for result in results.get("", arm)]
            rows.append([arm, *cells, mean, format_mean(chance, 3), f"{floor:.4f}"])
    count = max((len(row) - 4 for row in rows), default=0)
    headings = ["arm", *(f"layer {layer}" for layer in range(count)), "mean", "by chance", "floor"]
    lines += [*markdown_table(headings, rows), "", *_held_out(results), "### Domains and experts", ""]
    drawn = [arm for arm in (NONE, AUXILIARY, LOSS_FREE) if information(results, arm)]
    if drawn:
        _draw(folder / "domains.png", results, drawn)
        lines += [*paragraphs(FIGURE), f"![Share of each expert in each domain]({folder.name}/domains.png)", ""]
    return lines


def _held_out(results: Results) -> list[str]:
    """Write the table of the documents and tokens of each domain, which are those of every run."""
    loads = next((result.loads for result in results.all if "by_domain" in result.loads), None)
    if loads is None:
        return []
    columns = (loads["domains"], loads["documents_by_domain"], loads["tokens_by_domain"])
    rows = [[name, f"{documents:,}", f"{tokens:,}"] for name, documents, tokens in zip(*columns, strict=True)]
    return [*markdown_table(["domain", "documents held out", "tokens"], rows), ""]


FIGURE = """
The share of each domain's assignments that each expert takes, as a multiple of the share under uniform routing, for the
first seed. A column that is dark in every domain is an expert that takes more than its share of all text; a column that
is dark in one domain has specialized.
"""


def _draw(path: Path, results: Results, arms: Sequence[str]) -> None:
    first = [results.get("", arm)[0] for arm in arms]
    layers = len(first[0].loads["by_domain"])
    figure = Figure(figsize=(4.2 * len(arms), 1.9 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(layers, len(arms), squeeze=False, sharex=True, sharey=True)
    image = None
    for column, (arm, result) in enumerate(zip(arms, first, strict=True)):
        for layer, shares in enumerate(_shares(result)):
            axes = grid[layer][column]
            image = axes.imshow(shares, aspect="auto", cmap="magma_r", vmin=0.0, vmax=LARGEST_SHARE)
            axes.set_yticks(range(len(result.loads["domains"])), result.loads["domains"], fontsize=8)
            axes.set_title(arm if layer == 0 else "", fontsize=10)
            axes.set_xlabel(f"expert of MoE layer {layer}", fontsize=8)
            axes.tick_params(labelsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=list(grid.flat), extend="max")
        bar.set_label("share / uniform share", fontsize=9)
    figure.savefig(path, dpi=110)


def _shares(result: CellResult) -> Iterator[list[list[float]]]:
    """Yield, for each layer, the share of each expert in each domain times the number of experts: [D][E]."""
    for load_DE in result.loads["by_domain"]:
        yield [[len(row) * value / max(1, sum(row)) for value in row] for row in load_DE]


STUDY = Study(
    name="specialization",
    title="Does balancing blur what the experts specialize in?",
    introduction=INTRODUCTION,
    columns=(
        Column("loss, nats per token", "validation_loss", 4),
        Column("MaxVio", "max_vio_global", 3),
        Column("floor", "max_vio_global_floor", 3),
    ),
    claims=claims,
    sections=sections,
    notes=NOTES,
    shares=("loss_free",),
)
