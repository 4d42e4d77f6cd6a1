"""Tries every family of the installed transformers, and writes the records and the page of the families.

Usage: python -m tests.families [FAMILY]... [--check] [--only=balance|route|train]

The result of a version is in tests/families/results/VERSION.json; docs/families.md is written from all of them.
dist_moe/families/records.json is written first: with the pinned version the records of its families, with another one
those of families that the pinned one has no record of. With families, only these are tried again. With
--check, nothing is written, and a family that works in the file and does not work now, or has another record, is an
error. With --only, the other columns stay as they are.
"""

import json
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from dist_moe.families import probed
from dist_moe.families.registry import ARCHITECTURES, FAMILIES
from tests.dist.pool import RankPool
from tests.families.balanced import Balanced, try_balance
from tests.families.page import write_page
from tests.families.record import make_record
from tests.families.routed import Routed, try_route
from tests.families.small import families
from tests.families.trained import Trained, try_training

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
RESULTS = Path(__file__).parent / "results"
RECORDS = ROOT / "dist_moe" / "families" / probed.RECORDS
PINNED = "5.17.0"
"""The version of transformers whose models the records are made from."""
Result = TypeVar("Result", Balanced, Routed, Trained)


def main(arguments: list[str]) -> int:
    """Try families, and write the results; return how many are worse than their file says."""
    names, check = [each for each in arguments if not each.startswith("--")] or list(families()), "--check" in arguments
    only = next((each.partition("=")[2] for each in arguments if each.startswith("--only=")), "")
    worse = 0
    if not only:
        worse = check_records(names) if check else write_records(names)
    path = RESULTS / f"{transformers.__version__}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = {}
    with RankPool(2) as ranks, tempfile.TemporaryDirectory(prefix="dist-moe-families-") as folder:
        for name in names:
            attempts: dict[str, Callable[[], Any]] = {
                "balance": partial(_tried, Balanced, partial(try_balance, name)),
                "route": partial(_tried, Routed, partial(try_route, name)),
                "train": partial(_tried, Trained, partial(try_training, name, ranks, Path(folder))),
            }
            results = {kind: attempt() for kind, attempt in attempts.items() if only in ("", kind)}
            found[name] = known.get(name, {}) | {kind: asdict(result) for kind, result in results.items()}
            for kind, result in results.items():
                print(f"{name}: {kind}: {'works' if result.works else result.reason or result}", flush=True)
                before = known.get(name, {}).get(kind)
                if before is not None and type(result)(**before).works and not result.works:
                    print(f"{name} works in {path.name} and does not work now: {result}", file=sys.stderr)
                    worse += 1
    if not check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(sorted((known | found).items())), indent=1) + "\n")
        write_page(ROOT / "docs" / "families.md", RESULTS)
    return worse


def write_records(names: list[str]) -> int:
    """Write the records of these families; those of the others stay, with a newer version those of the pinned one."""
    records = json.loads(RECORDS.read_text())
    for model_type, made in _records_of(names):
        known = records.get(model_type, {})
        if transformers.__version__ == PINNED:
            records[model_type] = made
        elif not known or probed.SINCE in known:
            records[model_type] = made | {probed.SINCE: known.get(probed.SINCE, transformers.__version__)}
    RECORDS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
    new = {name: family for name, family in probed.read_records().items() if name not in FAMILIES}
    for known in (FAMILIES, ARCHITECTURES):
        known.update(new)
    return 0


def check_records(names: list[str]) -> int:
    """Return how many families have another record now."""
    records, different = json.loads(RECORDS.read_text()), 0
    for model_type, made in _records_of(names):
        known = records.get(model_type, {})
        is_of_version = transformers.__version__ == PINNED or not known or probed.SINCE in known
        if is_of_version and {key: value for key, value in known.items() if key != probed.SINCE} != made:
            print(f"{model_type} has another record now: {made}; run make families", file=sys.stderr)
            different += 1
    return different


def _records_of(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the architecture and the record of each family that has one by program."""
    for name in names:
        try:
            made = make_record(name)
        except Exception:  # models of another library raise errors of any type; training says which
            continue
        model_type = made.pop("model_type")
        if model_type not in FAMILIES or FAMILIES[model_type].is_probed:
            yield model_type, {key: value for key, value in made.items() if value is not None}


def _tried(kind: type[Result], attempt: Callable[[], Result]) -> Result:
    def expire(signal_number: int, frame: object) -> None:
        raise TimeoutError(f"it takes more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIMIT_S)
    try:
        return attempt()
    except Exception as error:  # models of another library raise errors of any type
        said = " ".join(str(error).split()).replace(f"{tempfile.gettempdir()}/", "")
        return kind(reason=f"{type(error).__name__}: {said[-300:]}")
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
