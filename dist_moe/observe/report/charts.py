"""The charts of a report: which curves of which runs, and how to read them."""

from collections.abc import Iterator, Sequence

from dist_moe.observe.report.results import NOT_RESULTS, loss_unit, metric_title
from dist_moe.observe.report.runs import RunData
from dist_moe.observe.report.svg import Chart, Line

FLOOR = "Dashed: the floor, which uniform random routing is expected to show."
OF_LAYERS = "Mean over layers."
Points = Sequence[tuple[float, float | None]]


def charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the charts of runs, the loss, the load and the speed first; without those that have no value."""
    found = [
        _loss(runs),
        *_task_metrics(runs),
        _with_floor(
            runs,
            "max_vio",
            "MaxVio of a step",
            f"Largest load of an expert / mean load - 1: 0 is balanced, 1 is twice the mean. {OF_LAYERS}",
            log=True,
        ),
        Chart(
            "tokens-per-s",
            "Tokens per second",
            "Over all workers, by the wall time between logged steps, reports and checkpoints included.",
            _curves(runs, "tokens_per_s", "tokens/s"),
            digits=0,
            from_zero=True,
        ),
        _with_floor(
            runs,
            "load_deviation_percent",
            "Load deviation of a step, %",
            f"Standard deviation of the experts' shares of the assignments. {OF_LAYERS}",
            digits=2,
            log=True,
        ),
        _with_floor(runs, "dead_experts", "Dead experts", "Experts of all layers without a token in a step.", digits=1),
        *_if_it_varies(
            _with_floor(
                runs,
                "rank_load",
                "Load of the busiest rank / mean",
                f"Rows that the busiest expert-parallel rank receives in a step / their mean: 1 is even. {OF_LAYERS}",
                from_zero=False,
            ),
        ),
        _with_floor(
            runs,
            "max_vio_computation",
            "MaxVio of a computation batch",
            "MaxVio of what experts compute at once: one micro-batch of one expert-parallel group. It is above that of "
            "the step, which averages over micro-batches.",
            log=True,
        ),
        _bias(runs),
        *_if_it_varies(_plain(runs, "experts_per_token", "Experts per token", "The mean number that a token took.")),
        *_if_it_varies(
            _plain(
                runs, "unrouted_percent", "Tokens without an expert, %", "Of all layers, as expert thresholds allow."
            )
        ),
        _plain(runs, "threshold", "Threshold", "The probability that the experts of a token have to reach together."),
        *_if_it_varies(_plain(runs, "auxiliary_loss", "Auxiliary loss", "Routing losses times their coefficients.")),
        _plain(runs, "grad_norm", "Gradient norm", "Before clipping, over all parameters.", log=True),
        _plain(runs, "learning_rate", "Learning rate", "Of each step.", digits=6),
        *_loss_over_time(runs),
    ]
    return [chart for chart in found if any(line.finite() for line in chart.lines)]


def _name(run: RunData, alone: bool, name: str) -> str:
    """Return the name of a curve: what it shows, or with several runs, whose it is."""
    return name if alone else run.name


def _points(run: RunData, key: str) -> Points:
    return [(float(step.step), getattr(step, key)) for step in run.metrics.steps]


def _evaluations(run: RunData, key: str) -> Points:
    return [(float(line.step), line.metrics.get(key)) for line in run.metrics.validations]


def _curves(runs: Sequence[RunData], key: str, name: str) -> list[Line]:
    """Return the curve of a number of the logged steps for each run."""
    alone = len(runs) == 1
    return [Line(_name(run, alone, name), f"run-{index}", _points(run, key)) for index, run in enumerate(runs)]


def _further(
    runs: Sequence[RunData], name: str, style: str, points: Sequence[Points], dots: bool = False
) -> list[Line]:
    """Return a further curve of each run, in its color; with several runs, the legend does not name it."""
    alone = len(runs) == 1
    lines = [
        Line(name if alone else f"{run.name}, {name}", f"run-{index} {style}", of_run, dots, in_legend=alone)
        for index, (run, of_run) in enumerate(zip(runs, points, strict=True))
    ]
    return [line for line in lines if line.finite()]


def _loss(runs: Sequence[RunData]) -> Chart:
    evaluations = [_evaluations(run, "validation_loss") for run in runs]
    lines = [
        *_curves(runs, "loss", "training"),
        *_further(runs, "validation", "validation", evaluations, dots=True),
    ]
    cross_entropy = any(loss_unit(run) for run in runs)
    what = "Cross entropy in nats, without auxiliary losses" if cross_entropy else "Mean squared error"
    return Chart("loss", "Loss", f"{what}. Dots: on held-out text.", lines, digits=4)


def _task_metrics(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Yield a chart of each further number that was evaluated more than once."""
    names = dict.fromkeys(name for run in runs for line in run.metrics.validations for name in line.metrics)
    shown = [name for name in names if name not in NOT_RESULTS and not name.endswith("_floor")]
    for number, name in enumerate(shown):
        title = metric_title(name)
        lines = [
            Line(_name(run, len(runs) == 1, title), f"run-{index}", _evaluations(run, name), dots=True)
            for index, run in enumerate(runs)
        ]
        if any(len(line.finite()) > 1 for line in lines):
            yield Chart(f"metric-{number}", title.capitalize(), "On held-out data.", lines, digits=4)


def _with_floor(
    runs: Sequence[RunData],
    key: str,
    title: str,
    meaning: str,
    digits: int = 3,
    log: bool = False,
    from_zero: bool = True,
) -> Chart:
    floors = _further(runs, "floor", "floor", [_points(run, f"{key}_floor") for run in runs])
    lines = [*_curves(runs, key, "value"), *floors]
    return Chart(_key(key), title, f"{meaning} {FLOOR}", lines, digits=digits, log=log, from_zero=from_zero)


def _plain(runs: Sequence[RunData], key: str, title: str, meaning: str, digits: int = 4, log: bool = False) -> Chart:
    return Chart(_key(key), title, meaning, _curves(runs, key, title.lower()), digits=digits, log=log)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _if_it_varies(chart: Chart) -> list[Chart]:
    """Return the chart if a curve of a run has more than one value, and nothing otherwise."""
    values = {y for line in chart.lines if "floor" not in line.style for _, y in line.finite()}
    return [chart] if len(values) > 1 else []


def _bias(runs: Sequence[RunData]) -> Chart:
    smallest = _further(runs, "smallest", "", [_points(run, "bias_min") for run in runs])
    absolute = _further(runs, "mean absolute", "floor", [_points(run, "bias_abs_mean") for run in runs])
    lines = [*_curves(runs, "bias_max", "largest"), *smallest, *absolute]
    meaning = "The largest and the smallest bias of an expert in any layer. Dashed: the mean absolute bias."
    return Chart("bias", "Selection bias", meaning, lines if any(y for line in lines for _, y in line.finite()) else [])


def _loss_over_time(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Yield the loss of several runs over the time that their steps took."""
    if len(runs) < 2:
        return
    lines = []
    for index, run in enumerate(runs):
        minutes, before = 0.0, 0
        points: list[tuple[float, float | None]] = []
        for step in run.metrics.steps:
            if step.step_ms is None:  # of a version that did not measure it
                points.clear()
                break
            minutes += (step.step - before) * step.step_ms / 60_000
            before = step.step
            points.append((minutes, step.loss))
        lines.append(Line(run.name, f"run-{index}", points))
    meaning = "Over the wall time of all steps so far, without what starts of the run took."
    yield Chart("loss-over-time", "Training loss over time", meaning, lines, x_title="minutes", digits=4)
