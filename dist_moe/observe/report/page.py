"""One self-contained page of HTML about a run or a comparison of runs, which opens without a network.

Everything from the files of a run is treated as untrusted: jinja2 and markupsafe escape it, and a policy in the page
lets the browser run no other script and load nothing, even where the escaping misses something.
"""

import base64
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dist_moe
from dist_moe.errors import needs_folder
from dist_moe.files import write_atomically
from dist_moe.observe.pictures.scale import MAX_RATIO
from dist_moe.observe.report.charts import charts
from dist_moe.observe.report.differing import (
    Fact,
    checkpoints,
    config_differences,
    config_settings,
    history,
    machine_facts,
    not_comparable,
    progress,
    warnings,
)
from dist_moe.observe.report.layers import LayerTable, layer_table
from dist_moe.observe.report.load_maps import (
    ABOVE,
    FIRST,
    LAST,
    LoadMap,
    RunLoads,
    layers_by_balance,
    palette,
    palette_ratios,
    read_run_loads,
    shown_layers,
)
from dist_moe.observe.report.map_svg import draw_map, draw_scale
from dist_moe.observe.report.results import (
    Result,
    Row,
    loss_unit,
    metric_title,
    number,
    result_at_end,
    result_rows,
    task_metrics,
    tokens_per_s,
    validation_result,
)
from dist_moe.observe.report.runs import RunData, RunState
from dist_moe.observe.report.svg import Chart, draw, legend
from dist_moe.text import counted, plain_text

OPEN_LAYERS = 4
"""Layers whose heat maps are shown at once; those of more are below one line that opens them."""
MOST_ERRORS, LONGEST_ERROR = 8, 600


class Card(NamedTuple):
    """One of the numbers of the first screen."""

    title: str
    number: str
    unit: str
    text: str


class ResultTexts(NamedTuple):
    """A row of the table of results."""

    title: str
    texts: list[str]
    meaning: str


class MapGroup(NamedTuple):
    """Heat maps below one heading."""

    title: str
    maps: list[LoadMap]
    collapsed: bool


class RunTexts(NamedTuple):
    """What the page says about one run."""

    name: str
    state: str
    progress: str
    problems: list[str]
    errors: list[str]
    history: list[tuple[str, str, str]]
    checkpoints: str
    warnings: list[tuple[str, str]]
    warning_count: str


@dataclass(frozen=True)
class Page:
    """The content of a page, as text, charts and images."""

    title: str
    runs: list[RunTexts]
    not_comparable: list[str]
    cards: list[Card]
    results: list[ResultTexts]
    differences: list[Fact]
    difference_count: str
    charts: list[Chart]
    maps: list[MapGroup]
    map_notes: list[str]
    scale: Markup
    layer_tables: list[LayerTable]
    settings: list[Fact]
    machine: list[Fact]
    data: dict[str, Any]


def write_page(path: Path, runs: Sequence[RunData]) -> int:
    """Write the page of runs, replacing the file -> its size in bytes.

    Raises:
        RunFolderError: The file cannot be written.
    """
    text = render(make_page(runs))
    with needs_folder(path, "--out", "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return len(text.encode())


def render(page: Page, written: datetime | None = None) -> str:
    """Return the page as HTML."""
    templates = Environment(
        loader=PackageLoader("dist_moe.observe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_plain_file(templates, name) for name in ("report.css", "report.js"))
    when = (written or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    text = templates.get_template("report.html").render(
        page=page,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        draw=draw,
        draw_map=draw_map,
        legend=legend,
        version=dist_moe.__version__,
        written=when,
    )
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
    return text.encode("utf-8", "backslashreplace").decode()


def _plain_file(templates: Environment, name: str) -> Markup:
    if templates.loader is None:
        raise RuntimeError("the templates have no loader")
    return Markup(templates.loader.get_source(templates, name)[0])


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def make_page(runs: Sequence[RunData]) -> Page:
    """Collect the content of a page."""
    loads, found = read_run_loads(runs), charts(runs)
    rows = result_rows(runs)
    tables = (layer_table(run, alone=len(runs) == 1) for run in runs)
    several = len(runs) > 1
    differing = config_differences(runs) if several else []
    return Page(
        title=runs[0].name if not several else " · ".join(run.name for run in runs),
        runs=[_run_texts(run) for run in runs],
        not_comparable=not_comparable(runs) if several else [],
        cards=[] if several else list(_cards(runs[0])),
        results=[_result_texts(row) for row in rows],
        differences=differing,
        difference_count=counted(len(differing), "field"),
        charts=found,
        maps=list(_map_groups(runs, loads)),
        map_notes=list(_map_notes(runs, loads)),
        scale=draw_scale(),
        layer_tables=[table for table in tables if table is not None],
        settings=config_settings(runs),
        machine=machine_facts(runs),
        data=_data(found, loads, _reference(runs)),
    )


def _result_texts(row: Row) -> ResultTexts:
    measure = row.measure
    return ResultTexts(measure.title, [measure.text(result) for result in row.results], measure.meaning)


def _run_texts(run: RunData) -> RunTexts:
    errors = [
        f"{'a rank' if error.rank < 0 else f'rank {error.rank}'}: {error.exception}: {error.message[:LONGEST_ERROR]}"
        for error in run.errors[:MOST_ERRORS]
    ]
    found = warnings(run)
    return RunTexts(
        name=run.name,
        state="failed" if run.state == RunState.FAILED else "",
        progress=progress(run),
        problems=list(run.problems),
        errors=[plain_text(error) for error in errors],
        history=history(run),
        checkpoints=checkpoints(run),
        warnings=found,
        warning_count=counted(len(found), "warning"),
    )


def _cards(run: RunData) -> Iterator[Card]:
    """Yield the numbers of the first screen of one run: what it has learned, balance, speed."""
    yield from _learned_card(run)
    yield from _balance_card(run)
    speed = tokens_per_s(run).value
    if speed is not None:
        workers = run.value("world", "workers")
        by = f"On {counted(workers, 'worker')}" if type(workers) is int else "Over all workers"
        yield Card("Speed", number(speed, 0), "tokens/s", f"{by}, reports and checkpoints included.")


def _learned_card(run: RunData) -> Iterator[Card]:
    """Yield the metrics of the task where it has some, else the loss."""
    validation, training = validation_result(run, "validation_loss").value, result_at_end(run, "loss").value
    losses = f"Loss on held-out text: {number(validation, 4)}; training: {number(training, 4)} at the end."
    if names := task_metrics(run):
        first, *others = ((metric_title(name), number(validation_result(run, name).value, 4)) for name in names)
        further = "".join(f"{title}: {value}. " for title, value in others)
        yield Card(first[0].capitalize(), first[1], "", f"{further}{losses}")
    elif validation is not None:
        bits = validation_result(run, "bits_per_byte").value
        per_byte = "" if bits is None else f"; {number(bits, 3)} bits per byte"
        text = f"On held-out text{per_byte}. Training: {number(training, 3)} at the end."
        yield Card("Validation loss", number(validation, 4), loss_unit(run), text)
    elif training is not None:
        yield Card("Training loss", number(training, 4), loss_unit(run), "Not evaluated on held-out text yet.")


def _balance_card(run: RunData) -> Iterator[Card]:
    result, where = validation_result(run, "max_vio_global"), "over the held-out text"
    if result.value is None:
        result, where = result_at_end(run, "max_vio"), "in a step at the end of training"
    if result.value is None:
        return
    of_what = "its target load" if run.has_targets else "the mean load"
    floor = "" if result.floor is None else f" By chance alone it would have {1 + result.floor:.2f}."
    yield Card(
        f"Balance: {'MaxVio_global' if where.startswith('over') else 'MaxVio'}",
        number(result.value, 3),
        _with_floor(result),
        f"The busiest expert of a layer has {1 + result.value:.2f} times {of_what} {where}.{floor}",
    )


def _with_floor(result: Result) -> str:
    return "" if result.floor is None else f"floor {number(result.floor, 3)}"


def _map_groups(runs: Sequence[RunData], loads: Sequence[RunLoads]) -> Iterator[MapGroup]:
    """Yield the heat maps: all layers at a glance where there are several, the least balanced layer, and all layers."""
    if not loads:
        return

    def titled(load_map: LoadMap, text: str = "") -> LoadMap:
        names = [*([text] if text else []), *([runs[load_map.run].name] if len(runs) > 1 else [])]
        return load_map.titled(", ".join(names))

    most = max(of_run.columns.layers for of_run in loads)
    if most > 1:
        title = f"Busiest expert of each layer: its load / the {_reference(runs)}"
        yield MapGroup(title, [titled(of_run.overview()) for of_run in loads], collapsed=False)
    shown = shown_layers(loads)
    if most > OPEN_LAYERS:
        least = layers_by_balance(loads)[0]
        maps = [titled(of_run.of_layer(least)) for of_run in loads if least < of_run.columns.layers]
        yield MapGroup(f"Load of each expert of layer {least}, the least balanced one", maps, collapsed=False)
    maps = [
        titled(of_run.of_layer(layer), f"layer {layer}")
        for layer in shown
        for of_run in loads
        if layer < of_run.columns.layers
    ]
    title = f"Load of each expert, {counted(len(shown), 'layer')}" if len(shown) > 1 else "Load of each expert"
    yield MapGroup(title, maps, collapsed=most > OPEN_LAYERS)


def _reference(runs: Sequence[RunData]) -> str:
    """Return what loads are relative to."""
    return "mean or target" if any(run.has_targets for run in runs) else "mean"


def _map_notes(runs: Sequence[RunData], loads: Sequence[RunLoads]) -> Iterator[str]:
    """Yield how the heat maps are to be read."""
    yield "Load of an expert / mean load of the experts of its layer. MoE layers and experts are counted from 0."
    if any(run.has_targets for run in runs):
        yield "Where a run has balance.shares, its loads and measures are relative to the target of each expert."
    joined = [of_run for of_run in loads if not of_run.columns_are_steps]
    if joined:
        yield "A column is the sum of several logged steps where a run has more of them than columns fit."
    most = max((of_run.columns.layers for of_run in loads), default=0)
    if (count := len(shown_layers(loads))) < most:
        yield f"The experts of the {count} least balanced layers of {most} are shown, to keep the page small."
    yield from (of_run.problem for of_run in loads if of_run.problem)


def _data(found: Sequence[Chart], loads: Sequence[RunLoads], reference: str) -> dict[str, Any]:
    """Return what the script of the page needs."""
    ratios = [None if math.isnan(ratio) else round(min(ratio, MAX_RATIO), 4) for ratio in palette_ratios().tolist()]
    return {
        "charts": {chart.key: chart.data() for chart in found},
        "palette": palette().tolist(),
        "ratios": ratios,
        "reference": reference,
        "above": ABOVE,
        "scale": list(range(FIRST, LAST + 1)),
        "runs": {
            str(of_run.run): {"steps": of_run.columns.steps, "single": of_run.columns_are_steps} for of_run in loads
        },
    }
