"""Surfaces of what runs and studies leave, and of labeled texts, with functions that read them."""

import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dist_moe.data.labeled.sources import fetch_labeled, read_labeled
from dist_moe.errors import UserError
from dist_moe.observe.report.page import make_page, render
from dist_moe.observe.report.runs import read_runs
from dist_moe.observe.report.terminal import comparison, comparison_values
from dist_moe.observe.routing.trace import read_trace, schemas
from dist_moe.study.grid.store import read_results
from tests.fuzz.inputs import edited, edited_json
from tests.fuzz.readers import by_file, encode, write
from tests.fuzz.surface import Surface
from tests.unit.data.labeled.test_arrow import save
from tests.unit.observe.report.sample_runs import write_run

RESULTS = {
    "format": 1,
    "study": "nlu",
    "preset": "small",
    "cells": [{"case": "a", "arm": "top-2", "seed": 0, "digest": "0" * 16, "values": {"accuracy": 0.75}}],
}
EXAMPLES = (
    b'{"text": "to be", "label": "yes"}\n{"text": "or not", "label": "no"}\n',
    b'{"text": "a", "text_pair": "b", "label": 1, "key": "k"}\r\n',
)
TABLES = (b'text,label\nto be,yes\n"or, not",no\n', b"sentence1,sentence2,label\na,b,1\n")


def result_surfaces() -> list[Surface]:
    """Return the files of a run that reports read, the trace of a run, and the results of a study."""
    files = run_files()
    lines = {
        name: [json.loads(line) for line in content.splitlines()] for name, content in files.items() if "jsonl" in name
    }
    changed = [st.tuples(st.just(name), edited([content])) for name, content in files.items()]
    changed += [st.tuples(st.just(name), edited_lines(records)) for name, records in lines.items()]
    changed.append(st.tuples(st.just("run.json"), edited_json([json.loads(files["run.json"])])))
    return [
        Surface("report", st.one_of(changed), read_report, list(files.items()), (UserError,)),
        Surface(
            "trace",
            st.one_of([st.tuples(st.just(name), edited([content])) for name, content in trace_files().items()]),
            read_changed_trace,
            list(trace_files().items()),
            (UserError,),
        ),
        Surface(
            "results of a study",
            edited([encode(RESULTS)]) | edited_json([RESULTS]),
            by_file("results.json", lambda folder: read_results(folder / "results.json")),
            [encode(RESULTS)],
            (UserError,),
        ),
    ]


def labeled_surfaces() -> list[Surface]:
    """Return the files of labeled texts."""
    arrow = arrow_files()
    return [
        Surface(
            "labeled jsonl",
            edited(EXAMPLES) | edited_json([json.loads(line) for text in EXAMPLES for line in text.splitlines()]),
            by_file("a.jsonl", functools.partial(read_examples, name="a.jsonl")),
            EXAMPLES,
            (UserError,),
        ),
        Surface(
            "labeled csv",
            edited(TABLES),
            by_file("a.csv", functools.partial(read_examples, name="a.csv")),
            TABLES,
            (UserError,),
        ),
        Surface(
            "labeled tsv",
            edited([table.replace(b",", b"\t") for table in TABLES]),
            by_file("a.tsv", functools.partial(read_examples, name="a.tsv")),
            [TABLES[1].replace(b",", b"\t")],
            (UserError,),
        ),
        Surface(
            "labeled arrow",
            st.one_of([st.tuples(st.just(name), edited([content])) for name, content in arrow.items()]),
            read_arrow_folder,
            list(arrow.items()),
            (UserError,),
        ),
    ]


def edited_lines(records: list[object]) -> SearchStrategy[bytes]:
    """All records as lines, after a change inside one of them."""
    whole = [encode(record) for record in records]

    def replaced(change: tuple[int, bytes]) -> bytes:
        place, line = change
        return b"\n".join([*whole[:place], line, *whole[place + 1 :]]) + b"\n"

    places = st.integers(0, len(records) - 1)
    return places.flatmap(lambda place: st.tuples(st.just(place), edited_json([records[place]]))).map(replaced)


@functools.cache
def run_files() -> dict[str, bytes]:
    """Return the files of a run by their names."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run")
        names = ("run.json", "metrics.jsonl", "events.jsonl")
        return {name: (run / name).read_bytes() for name in names} | {
            "errors/rank-0.txt": b'time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: E\nmessage: "m"\n\nt'
        }


def read_report(change: tuple[str, bytes], folder: Path) -> object:
    """Write the page and the comparison of a run that has one changed file."""
    name, content = change
    shutil.rmtree(folder / "run", ignore_errors=True)
    for each, valid in run_files().items():
        if not each.startswith("errors") or each == name:
            write(folder / "run" / each, content if each == name else valid)
    runs = read_runs([folder / "run"])
    return render(make_page(runs)), list(comparison(runs)), json.dumps(comparison_values(runs))


@functools.cache
def trace_files() -> dict[str, bytes]:
    """Return a Parquet file of each table of a trace."""
    files = {}
    for table, schema in schemas().items():
        columns = [
            pa.array([[1, 2]] * 3 if pa.types.is_list(each.type) else [1] * 3).cast(each.type) for each in schema
        ]
        content = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), content)
        files[table] = content.getvalue()
    return files


def read_changed_trace(change: tuple[str, bytes], folder: Path) -> object:
    """Read a trace in which the file of one table is changed."""
    for table, content in {**trace_files(), change[0]: change[1]}.items():
        write(folder / "trace" / table / "step-00000001-rank-00000.parquet", content)
    trace = read_trace(folder)
    return trace.loads.to_pylist(), trace.tokens.to_pylist()


def read_examples(folder: Path, name: str) -> object:
    """Read a file of labeled texts."""
    path = str(folder / name)
    fetch_labeled([path], folder / "cache")
    return list(read_labeled(path, folder / "cache"))


@functools.cache
def arrow_files() -> dict[str, bytes]:
    """Return the files of a dataset on disk."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        save(data, {"text": ["to be", "or not"], "label": [0, 1]}, ["no", "yes"], files=1)
        return {path.name: path.read_bytes() for path in data.iterdir()}


def read_arrow_folder(change: tuple[str, bytes], folder: Path) -> object:
    """Read a dataset on disk that has one changed file."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    for name, content in {**arrow_files(), change[0]: change[1]}.items():
        write(folder / "data" / name, content)
    path = str(folder / "data")
    fetch_labeled([path], folder / "cache")
    return list(read_labeled(path, folder / "cache"))
