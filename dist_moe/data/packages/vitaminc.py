"""Claims and passages of Wikipedia that support, refute or do not decide them (Schuster et al. 2021, arXiv 2103.08541).

The task of MNLI, split by page.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dist_moe.data.labeled.example import Example
from dist_moe.data.packages.bigbench import VITAMINC_FILE

CLAIM = "\nClaim: "


def read_vitaminc(folder: Path) -> Iterator[Example]:
    """Yield the 54,668 pairs of a passage, which begins with the title of its page, and a claim."""
    for entry in json.loads((folder / VITAMINC_FILE).read_text(encoding="utf-8"))["examples"]:
        passage, _, claim = entry["input"].rpartition(CLAIM)
        scores = entry["target_scores"]
        yield Example(passage.partition(": ")[0], passage, claim, max(scores, key=scores.__getitem__))
