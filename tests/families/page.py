"""The page of the families, from the results of each version of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_moe.text import listed
from tests.families import balanced, routed, trained
from tests.families.balanced import Balanced
from tests.families.routed import Routed
from tests.families.trained import Trained

HEAD = """\
# Families of models

Every family of transformers that has stacked experts, by version. `make families` writes this page, and the records of
the families in `dist_moe/families/records.json`: it builds a small model of each with random weights.

- **Balance**: `dist_moe.balance` ([Balance in a script of your own](library.md)) in the model of transformers. Its
  routers are made uneven, and it is trained for {balance_steps} steps on text. It works where the counts are those that
  the experts received, and MaxVio of the worst layer falls to less than half. *own*: the model has a selection bias,
  which is updated; *ours*: the results of its router are selected again.
- **Route**: `dist_moe.route` in the model of transformers. It works where the logits with the family's own rule are
  those of transformers, to {same_routed:.0e} of the largest, and, in {route_steps} steps with threshold routing and
  adaptive weights, MaxVio falls to less than half.
- **Train**: `dist-moe train` for {train_steps} steps in fp32, on one worker and on two expert-parallel workers. It
  works where the losses of the first {compared} steps are equal to {same_loss:.0e}, MaxVio falls to less than half, and
  transformers opens the saved weights with the same logits, to {same_logits:.0e} of the largest. An encoder, of which
  transformers has a base model and no language model, is trained to classify texts; its last hidden states are
  compared, and *export* has its head, too, which transformers does not read. *folder*: it opens the
  model folder of the checkpoint; *export*: it opens what `dist-moe checkpoint export --plain` writes, since the run has
  a selection bias for which the family has no place, or the family stacks its experts in the files; *multimodal*: the
  run starts from the folder of a multimodal model, and transformers opens what `--plain` writes, that model with its
  language model trained. *packed*: rows
  hold several documents, which do not see each other; *one a row*: the layers of the family compute across documents,
  or by the place of a token in its row, so each is given a row of its own.

MaxVio: in the first step and on average over the last five; of balance and route, of the layers whose experts a bias
moves. The sampling floor of a step is {floor:.2f}.
"""


def write_page(path: Path, results: Path) -> None:
    """Write the page from the results of all versions."""
    versions = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    names = sorted({name for found in versions.values() for name in found})
    head = HEAD.format(
        balance_steps=balanced.STEPS,
        train_steps=trained.STEPS,
        route_steps=routed.STEPS,
        same_routed=routed.SAME_LOGITS,
        compared=trained.COMPARED,
        same_loss=trained.SAME_LOSS,
        same_logits=trained.SAME_LOGITS,
        floor=max(_trained(each).floor for found in versions.values() for each in found.values() if _works(each)),
    )
    lines = [head]
    for version, found in versions.items():
        parts = [f"`dist_moe.balance` works in {sum(_balanced(each).works for each in found.values())}"]
        for kind, of, name in (("route", _routed, "`dist_moe.route`"), ("train", _trained, "`dist-moe train`")):
            if any(kind in each for each in found.values()):
                parts.append(f"{name} in {sum(of(each).works for each in found.values())}")
        lines.append(f"transformers {version}: {listed(parts, last='and')} of {len(found)} families.\n")
    titles = ["family"]
    for version in versions:
        titles += [f"balance ({version})", "router", "MaxVio", "route", f"train ({version})", "MaxVio", "documents"]
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name in names:
        cells = [name]
        for found in versions.values():
            cells += _cells(found.get(name))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Why the others do not work", ""]
    for version, found in versions.items():
        for name, each in sorted(found.items()):
            lines += [f"- {name} ({version}), {what}: {reason}" for what, reason in _reasons(each)]
    path.write_text("\n".join(lines) + "\n")


def _balanced(result: Mapping[str, Any]) -> Balanced:
    return Balanced(**result["balance"])


def _trained(result: Mapping[str, Any]) -> Trained:
    return Trained(**result.get("train", {}))


def _routed(result: Mapping[str, Any]) -> Routed:
    return Routed(**result.get("route", {}))


def _works(result: Mapping[str, Any]) -> bool:
    return _trained(result).works


def _cells(result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return ["not in this version", *[""] * 6]
    found, run = _balanced(result), _trained(result)
    cells = (
        [found.bias, found.rule, f"{found.before:.2f} → {found.after:.2f}"] if found.works else ["no", found.rule, ""]
    )
    by = _routed(result)
    cells.append(f"{by.before:.2f} → {by.after:.2f}" if by.works else "no" if "route" in result else "not tried")
    if run.works:
        return [*cells, run.opened, f"{run.before:.2f} → {run.after:.2f}", run.documents]
    return [*cells, "no" if "train" in result else "not tried", "", ""]


def _reasons(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found, run = _balanced(result), _trained(result)
    reasons = []
    if not found.works:
        reasons.append(("balance", found.reason or "MaxVio does not fall to half, or counts differ"))
    by = _routed(result)
    if "route" in result and not by.works:
        differs = f"logits differ by {by.difference:.0e}, MaxVio {by.before:.2f} → {by.after:.2f}"
        reasons.append(("route", by.reason or differs))
    if "train" in result and not run.works:
        reasons.append(
            (
                "train",
                run.reason
                or f"losses differ by {run.losses:.0e}, logits by {run.logits:.0e}, MaxVio "
                f"{run.before:.2f} → {run.after:.2f}",
            )
        )
    return reasons
