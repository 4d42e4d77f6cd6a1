"""What TensorBoard shows of a run: its scalar cards with their explanations, its texts, and its table of runs.

The number of cards does not depend on the model: what a run has for each layer is in pictures and in one table.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_moe.config.differences import set_values
from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.observe.metrics import StepMetrics
from dist_moe.observe.pictures.load import MOST_LAYERS
from dist_moe.policies.shares import TargetShares, equal_shares, extreme_loads

OVERVIEW, PICTURES, DETAILS, DISTRIBUTIONS = "1_overview", "2_load_pictures", "3_details", "4_distributions"
GUIDE_TAG, LAYERS_TAG, CONFIG_TAG = "1_guide", "2_layers", "3_config"
STALL_TAG = f"{DETAILS}/checkpoint_stall_ms"

OfStep = Callable[[StepMetrics], float | None]
OfEvaluation = Callable[[EvaluationMetrics], float | None]


def _nothing(metrics: StepMetrics | EvaluationMetrics) -> None:
    """Return no value: the card does not have this curve."""


@dataclass(frozen=True)
class Card:
    """One scalar card: a curve of the steps, and those of its floor and of the validation where it has them.

    Attributes:
        tag: Group and name; both are sorted by their letters.
        description: What the value is, in Markdown.
        step, floor: Value and floor of a logged step; None where the step has none.
        validation: Value of an evaluation.
        of_load: Whether the value needs MoE layers.
    """

    tag: str
    description: str
    step: OfStep = _nothing
    floor: OfStep = _nothing
    validation: OfEvaluation = _nothing
    of_load: bool = True


def _worst_layer(metrics: StepMetrics) -> int:
    return max(range(len(metrics.load)), key=lambda layer: metrics.max_vio_per_layer[layer])


def _largest_bias(metrics: StepMetrics) -> float | None:
    ranges = [bias for bias in metrics.bias_per_layer if bias is not None]
    return max((max(abs(bias.min), abs(bias.max)) for bias in ranges), default=None) or None


def varies(metrics: StepMetrics | EvaluationMetrics) -> bool:
    """Return whether tokens took different numbers of experts, as with threshold routing."""
    return sum(count > 0 for count in metrics.experts_per_token_histogram) > 1


_FLOOR = "The curve `floor` is the mean of this value if every token chose its experts at random, on as many tokens."
CARDS = (
    Card(
        f"{OVERVIEW}/loss",
        "Without the auxiliary loss. Of a language model: mean of -ln p over the label tokens of the global batch, in "
        "nats per token; of a classification: over its texts, with `task.class_weights`; of a regression: the mean "
        "squared error. The curve `validation` is that of the held-out text, without class weights.",
        lambda metrics: metrics.loss,
        validation=lambda metrics: metrics.validation_loss,
        of_load=False,
    ),
    Card(
        f"{OVERVIEW}/max_vio",
        "MaxVio = (largest load - mean load) / mean load of the experts of a layer in one step, mean over the layers: "
        f"0 is balanced, 1 is twice the mean. {_FLOOR} The curve `validation` is MaxVio_global: over the whole "
        "held-out text, whose floor is lower.",
        lambda metrics: metrics.max_vio,
        lambda metrics: metrics.max_vio_floor,
        lambda metrics: metrics.max_vio_global,
    ),
    Card(
        f"{OVERVIEW}/max_vio_worst_layer",
        f"MaxVio of the layer where it is largest. {_FLOOR} It is that of one layer; the largest value of many layers "
        "is above it by chance.",
        lambda metrics: metrics.max_vio_per_layer[_worst_layer(metrics)],
        lambda metrics: metrics.max_vio_floor_per_layer[_worst_layer(metrics)],
        lambda metrics: max(metrics.max_vio_global_per_layer),
    ),
    Card(
        f"{OVERVIEW}/tokens_per_s",
        "Tokens of all workers in a second of wall time since the previous logged step, with checkpoints and reports.",
        lambda metrics: metrics.tokens_per_s,
        of_load=False,
    ),
    Card(
        f"{DETAILS}/auxiliary_loss",
        "The routing losses times their coefficients, as they are added to the loss.",
        lambda metrics: metrics.auxiliary_loss or None,
    ),
    Card(
        f"{DETAILS}/balance_rate",
        "Step size of the update of the selection bias (`balance.rate` by its schedule).",
        lambda metrics: metrics.balance_rate or None,
    ),
    Card(
        f"{DETAILS}/bias_largest",
        "Largest absolute selection bias of any expert. Biases that keep growing mean that the load does not follow.",
        _largest_bias,
    ),
    Card(
        f"{DETAILS}/bits_per_byte",
        "Validation loss in bits for each byte of text, which does not depend on the tokenizer.",
        validation=lambda metrics: None if metrics.task_metrics else metrics.bits_per_byte,
        of_load=False,
    ),
    Card(
        f"{DETAILS}/dead_experts",
        f"Experts without a token in the step, summed over the layers. {_FLOOR}",
        lambda metrics: metrics.dead_experts,
        lambda metrics: metrics.dead_experts_floor,
    ),
    Card(
        f"{DETAILS}/experts_per_token",
        "Mean number of experts that a token took; shown where it varies.",
        lambda metrics: metrics.experts_per_token if varies(metrics) else None,
        validation=lambda metrics: metrics.experts_per_token if varies(metrics) else None,
    ),
    Card(
        f"{DETAILS}/grad_norm",
        "2-norm of the gradient of all parameters before clipping.",
        lambda metrics: metrics.grad_norm,
        of_load=False,
    ),
    Card(
        f"{DETAILS}/learning_rate",
        "Learning rate of the step.",
        lambda metrics: metrics.learning_rate,
        of_load=False,
    ),
    Card(
        f"{DETAILS}/load_deviation_percent",
        f"Standard deviation of the experts' shares of the assignments, in percent, mean over the layers. {_FLOOR}",
        lambda metrics: metrics.load_deviation_percent,
        lambda metrics: metrics.load_deviation_percent_floor,
        lambda metrics: metrics.load_deviation_percent,
    ),
    Card(
        f"{DETAILS}/max_vio_computation",
        "MaxVio of a computation batch: what experts compute at once, one micro-batch of one expert-parallel group. It "
        f"decides how long the ranks wait for each other, and is above that of the step. {_FLOOR}",
        lambda metrics: metrics.max_vio_computation,
        lambda metrics: metrics.max_vio_computation_floor,
    ),
    Card(
        f"{DETAILS}/rank_load",
        "Rows that the most loaded expert-parallel rank receives / their mean, mean over the layers: 1 is balanced, "
        f"and always so with one rank. {_FLOOR}",
        lambda metrics: metrics.rank_load if metrics.rank_load != 1.0 else None,  # as with one rank
        lambda metrics: metrics.rank_load_floor if metrics.rank_load != 1.0 else None,
    ),
    Card(
        f"{DETAILS}/skipped_steps",
        "Steps without an update since step 0, because a loss or gradient was not finite.",
        lambda metrics: metrics.skipped_steps or None,
        of_load=False,
    ),
    Card(
        f"{DETAILS}/threshold",
        "The cumulative probability that the experts of a token reach (threshold routing).",
        lambda metrics: metrics.threshold,
    ),
    Card(
        f"{DETAILS}/unrouted_percent",
        "Tokens that took no expert, in percent of the tokens of all layers; shown where some did (expert thresholds).",
        lambda metrics: metrics.unrouted_percent or None,
        validation=lambda metrics: metrics.unrouted_percent or None,
    ),
)
TASK_CARDS = {
    "accuracy": "Share of the held-out texts whose class is right.",
    "macro_f1": "F1 of each class, mean over the classes, of the held-out texts.",
    "matthews": "Matthews correlation of the classes of the held-out texts: 1 is right, 0 is chance.",
    "pearson": "Pearson correlation of the predicted with the given values of the held-out texts.",
    "spearman": "Rank correlation (Spearman) of the predicted with the given values of the held-out texts.",
}
"""Of tasks with labeled texts, in the overview."""
PICTURE_DESCRIPTIONS = {
    **{
        f"experts_over_steps_{number}": "Load of each expert of one layer / the mean of the layer, over the steps of "
        "the run. All layers have such a picture where these are at most four, else the four that are least balanced "
        "in the last quarter of the run, worst first; the title names the layer."
        for number in range(1, MOST_LAYERS + 1)
    },
    "layers_over_steps": "Load of the most loaded expert of each layer / the mean of its layer, over the steps.",
    "last_step": "Load of each expert of each layer / the mean of its layer, in this step.",
    "validation": "Load of each expert of each layer / the mean of its layer, over the held-out text.",
}
DISTRIBUTION_DESCRIPTIONS = {
    "selection_bias": "Selection bias of each expert of each layer.",
    "router_scores": "Scores of the router for sampled tokens, before the selection bias.",
    "gate_weights": "Gate weights of the experts that sampled tokens took.",
    "experts_per_token": "How many tokens took 1, 2, 3 ... experts, over all layers.",
}
STALL_DESCRIPTION = "Milliseconds that training waited for a checkpoint; the rest is written while it continues."
DESCRIPTIONS: dict[str, str] = {
    **{card.tag: card.description for card in CARDS},
    **{f"{OVERVIEW}/{name}": description for name, description in TASK_CARDS.items()},
    **{f"{PICTURES}/{name}": description for name, description in PICTURE_DESCRIPTIONS.items()},
    **{f"{DISTRIBUTIONS}/{name}": description for name, description in DISTRIBUTION_DESCRIPTIONS.items()},
    STALL_TAG: STALL_DESCRIPTION,
}


def step_curves(metrics: StepMetrics, load_alone: bool = False) -> tuple[dict[str, float], dict[str, float]]:
    """Return the values of a logged step by tag, and their floors.

    Args:
        metrics: The step.
        load_alone: Leave out what is not about the load, and what was not measured (NaN).
    """
    cards = [card for card in CARDS if (metrics.load if card.of_load else not load_alone)]
    values = _present({card.tag: card.step(metrics) for card in cards})
    floors = _present({card.tag: card.floor(metrics) for card in cards})
    return (_measured(values), _measured(floors)) if load_alone else (values, floors)


def validation_curves(metrics: EvaluationMetrics) -> dict[str, float]:
    """Return the values of an evaluation by tag."""
    values = _present({card.tag: card.validation(metrics) for card in CARDS if metrics.load or not card.of_load})
    return values | {f"{OVERVIEW}/{name}": value for name, value in metrics.task_metrics.items()}


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: value for tag, value in values.items() if value is not None}


def _measured(values: Mapping[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in values.items() if not math.isnan(value)}


GUIDE = f"""\
# What is shown here

Each card of **Time Series** has an explanation, shown by its (i). The curve with the name of the run is that of the
steps; `floor` is what chance alone gives, and `validation` is the held-out text.

| group | what is in it |
|---|---|
| `{OVERVIEW}` | loss, imbalance (MaxVio), speed: look here first |
| `{PICTURES}` | the load of each expert and layer over the steps; layer by expert of a step and of the held-out text |
| `{DETAILS}` | the learning rate, the gradient, and further measures of the load |
| `{DISTRIBUTIONS}` | selection biases, scores of the router, gate weights, experts of a token |

The text `{LAYERS_TAG}` has the numbers of each layer, with their floors, and `{CONFIG_TAG}` the whole configuration.

# The numbers

**MaxVio** is (largest load - mean load) / mean load of the experts of a layer (Wang et al. 2024, arXiv 2408.15664): 0
is balanced, 1 is an expert with twice the mean.

**The floor.** Even a router that chooses at random shows a MaxVio above 0, since a step has a finite number of tokens.
The floor is the mean of the measure under such a router, for the same number of experts and assignments. A curve on its
floor is as balanced as it can be; below it by a lasting margin, tokens avoid each other more than chance would.

| value | balanced | floor |
|---|---|---|
| `max_vio`, `max_vio_worst_layer` | 0 | expected MaxVio of the assignments of a step, for each layer |
| `max_vio_computation` | 0 | the same for the assignments of one micro-batch of one expert-parallel group |
| `load_deviation_percent` | 0 | expected standard deviation of the shares |
| `rank_load` | 1 | expected load of the fullest rank / mean |
| `dead_experts` | 0 | expected number of experts without a token |
| `accuracy`, `macro_f1`, `matthews`, `pearson`, `spearman` of a task with labels | | none |
| `loss`, `tokens_per_s` and the others | | none |

# The pictures

Colors show the load of an expert / the mean load of its layer: white is the mean, blue less, red and purple up to 5
times the mean. Above 5 a cell is magenta, without a token black. A picture over steps shows the whole run so far; where
steps are more than its columns, a column is the sum of several. With target shares (`balance.shares`), every measure
and picture takes the target of an expert instead of the mean.
"""


TABLE_COLUMNS = {
    "max_vio": "MaxVio",
    "max_vio_computation": "MaxVio of a computation batch",
    "load_deviation_percent": "deviation, %",
    "rank_load": "rank load",
}
"""Of the table of layers: fields of a step, which have values of each layer, with their titles."""


def layers_table(metrics: StepMetrics, target_shares: TargetShares = equal_shares) -> str:
    """Return a Markdown table with the numbers of each layer in a step, each followed by its floor in brackets.

    Args:
        metrics: The step.
        target_shares: The target shares of the experts of a layer.
    """
    has_targets = any(target_shares(len(load)) is not None for load in metrics.load)
    measured = {key: title for key, title in TABLE_COLUMNS.items() if not math.isnan(getattr(metrics, key))}
    extremes_title = f"least and most loaded expert, load / {'target' if has_targets else 'mean'}"
    titles = ["layer", *measured.values(), "experts per token", extremes_title, "bias"]
    lines = [
        f"Step {metrics.step:,}; the floor of each value is in brackets.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    for layer, load in enumerate(metrics.load):
        extremes = ", ".join(
            f"{expert}: {ratio:.2f}" for expert, ratio in extreme_loads(load, target_shares(len(load)))
        )
        bias = metrics.bias_per_layer[layer]
        cells = [
            str(layer),
            *(
                f"{getattr(metrics, f'{name}_per_layer')[layer]:.3f} "
                f"({getattr(metrics, f'{name}_floor_per_layer')[layer]:.3f})"
                for name in measured
            ),
            f"{metrics.experts_per_token_per_layer[layer]:.2f}",
            extremes,
            "none" if bias is None else f"{bias.min:.4f} to {bias.max:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


MOST_HYPER_PARAMETERS, MOST_CHARACTERS = 40, 200
NOT_COMPARED = ("run.dir", "kubernetes.", "slurm.", "cluster.", "checkpoint.", "observe.")
"""Fields of the configuration that have no column in the table of runs."""
ALWAYS_COMPARED = ("model.architecture", "balance.policy", "parallel.expert_parallel", "run.seed")
# Tag and curve of the values in the table of runs, with their names there.
RESULTS = {
    (f"{OVERVIEW}/loss", "validation"): "validation loss",
    (f"{OVERVIEW}/accuracy", "validation"): "accuracy",
    (f"{OVERVIEW}/pearson", "validation"): "Pearson",
    (f"{OVERVIEW}/max_vio", "validation"): "MaxVio_global",
    (f"{OVERVIEW}/tokens_per_s", ""): "tokens/s",
}


def hyper_parameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return the fields of the table of runs: a few that every run has, and those that differ from their defaults.

    Args:
        config: Nested plain values.
    """
    always = {key: (config.get(key.partition(".")[0]) or {}).get(key.partition(".")[2]) for key in ALWAYS_COMPARED}
    given = {key: value for key, value in set_values(config).items() if not key.startswith(NOT_COMPARED)}
    found = {key: value for key, value in {**always, **given}.items() if value is not None}
    return {
        key: value if isinstance(value, bool | int | float) else str(value)[:MOST_CHARACTERS]
        for key, value in itertools.islice(found.items(), MOST_HYPER_PARAMETERS)
    }
