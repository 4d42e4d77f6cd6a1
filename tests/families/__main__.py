"""Tries every family of the installed transformers, and writes the page of the families.

Usage: python -m tests.families [FAMILY]... [--check]

The result of a version is in tests/families/results/VERSION.json; docs/families.md is written from all of them. With
families, only these are tried again. With --check, nothing is written, and a family that works in the file and does not
work now is an error.
"""

import json
import logging
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.families.balanced import Balanced, try_balance
from tests.families.page import write_page
from tests.families.small import families

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Try families, and write the results; return how many are worse than their file says."""
    names, check = [each for each in arguments if not each.startswith("--")], "--check" in arguments
    path = RESULTS / f"{transformers.__version__}.json"
    known = {name: Balanced(**values) for name, values in json.loads(path.read_text()).items()} if path.exists() else {}
    found = {}
    for name in names or families():
        found[name] = _tried(name)
        print(f"{name}: {'works' if found[name].works else found[name].reason or found[name]}", flush=True)
    worse = [name for name, result in found.items() if name in known and known[name].works and not result.works]
    for name in worse:
        print(f"{name} works in {path.name} and does not work now: {found[name]}", file=sys.stderr)
    if not check:
        path.parent.mkdir(exist_ok=True)
        values = {name: asdict(result) for name, result in sorted((known | found).items())}
        path.write_text(json.dumps(values, indent=1) + "\n")
        write_page(ROOT / "docs" / "families.md", RESULTS)
    return len(worse)


def _tried(name: str) -> Balanced:
    def expire(signal_number: int, frame: object) -> None:
        raise TimeoutError(f"it takes more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIMIT_S)
    try:
        return try_balance(name)
    except Exception as error:  # models of another library raise errors of any type
        return Balanced(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
