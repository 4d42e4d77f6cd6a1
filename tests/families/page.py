"""The page of the families, from the results of each version of transformers."""

import json
from pathlib import Path

from tests.families.balanced import STEPS, Balanced

HEAD = """\
# Families of models

`dist_moe.balance` ([Balance in a script of your own](library.md)) in every family of transformers that has stacked
experts, by version. `make families` writes this page: it builds a small model of each family with random weights, makes
its routers uneven, trains it for {steps} steps on text, and compares the counts with what the experts received. A
family works where all counts are equal and MaxVio of the worst layer falls to less than half.

- *bias*: `own`, the model has a selection bias, which is updated; `ours`, its router's results are selected again.
- *MaxVio*: of the worst layer, in the first step and on average over the last five, with the sampling floor of a step.

`dist-moe train` trains some of them, with expert parallelism and threshold routing: DeepSeek-V3, Qwen3-MoE, and dense
models that are upcycled.
"""


def write_page(path: Path, results: Path) -> None:
    """Write the page from the results of all versions."""
    versions = {
        file.stem: {name: Balanced(**values) for name, values in json.loads(file.read_text()).items()}
        for file in sorted(results.glob("*.json"))
    }
    names = sorted({name for found in versions.values() for name in found})
    lines = [HEAD.format(steps=STEPS)]
    for version, found in versions.items():
        works = sum(result.works for result in found.values())
        lines.append(f"transformers {version}: {works} of {len(found)} families work.\n")
    titles = ["family"]
    for version in versions:
        titles += [f"bias ({version})", "rule", "MaxVio", "floor"]
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name in names:
        cells = [name]
        for found in versions.values():
            cells += _cells(found.get(name))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Why the others do not work", ""]
    for version, found in versions.items():
        for name, result in sorted(found.items()):
            if not result.works:
                lines.append(
                    f"- {name} ({version}): {result.reason or 'MaxVio does not fall to half, or counts differ'}"
                )
    path.write_text("\n".join(lines) + "\n")


def _cells(result: Balanced | None) -> list[str]:
    if result is None:
        return ["not in this version", "", "", ""]
    if not result.works:
        return ["no", result.rule, "", ""]
    return [result.bias, result.rule, f"{result.before:.2f} → {result.after:.2f}", f"{result.floor:.2f}"]
