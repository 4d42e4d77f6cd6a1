"""Run folders for the tests of reports, written by the package's own recorder."""

import html.parser
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_moe.config import load_config
from dist_moe.observe.record import RunRecorder
from tests.unit.observe.samples import Counts, evaluation_sample, step_sample

DEBUG = Path(__file__).resolve().parents[4] / "configs/debug.yaml"
EVEN, UNEVEN = ([20, 20, 20, 20], [15, 15, 15, 15]), ([20, 20, 40, 0], [60, 0, 0, 0])
STEPS = (1, 10, 20, 30)
LAYOUT = {"workers": 2, "expert_parallel": 2, "corpus": "0123456789abcdef", "launcher": "torchrun"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7654321*1234567}}\x1b[31m\u202e\ud800"
VOID = {"meta", "path", "image", "rect", "line", "circle", "img", "br", "link"}


def write_run(
    folder: Path,
    changes: Sequence[str] = (),
    loads: Sequence[Counts] = (UNEVEN, UNEVEN, EVEN, EVEN),
    evaluated: bool = True,
    layout: dict[str, Any] | None = None,
) -> Path:
    """Write a run of configs/debug.yaml that logged steps 1, 10, 20 and 30, with a falling loss."""
    config = load_config(DEBUG, ["train.steps=30", *changes]).model_dump(mode="json")
    with RunRecorder(folder) as recorder:
        recorder.describe(config, "", layout={**LAYOUT, **(layout or {})})
        recorder.event("start", 0, workers=2)
        for step, load in zip(STEPS, loads, strict=True):
            recorder.write(step_sample(step=step, loads=load, loss=4.0 - step / 20).as_dict())
        recorder.write({"event": "checkpoint", "step": 30, "bytes": 1_500_000, "stall_ms": 12.0, "write_ms": 80.0})
        if evaluated:
            recorder.write(evaluation_sample(step=30, loads=loads[-1]).as_dict())
            recorder.event("finished", 30)
    return folder


def change_json(path: Path, **values: Any) -> None:
    """Replace top-level values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def hostile_run(folder: Path) -> Path:
    """Write a run with hostile text in every place that a report shows."""
    write_run(folder)
    description = json.loads((folder / "run.json").read_text())
    description["config"] |= {HOSTILE: {HOSTILE: HOSTILE}}
    description["config"]["balance"]["policy"] = HOSTILE
    change_json(
        folder / "run.json",
        config=description["config"],
        started=HOSTILE,
        argv=[HOSTILE, HOSTILE],
        versions={HOSTILE: HOSTILE, "torch": HOSTILE},
        source={"commit": HOSTILE, "dirty": True},
        host={"cpu": HOSTILE, "cores": HOSTILE, "accelerators": [HOSTILE], "system": HOSTILE},
        world={"workers": HOSTILE, "corpus": HOSTILE, "launcher": HOSTILE, "device": HOSTILE},
    )
    with RunRecorder(folder) as recorder:
        for step in (30, 40):
            recorder.write({**evaluation_sample(step=step).as_dict(), "<b>accuracy</b>": 0.5 + step / 1000})
        recorder.write({"event": HOSTILE, "step": 1})
    events = [{"event": "start", "step": 5, "time": HOSTILE[:40], "resumed_from": HOSTILE}]
    events += [{"event": "warning", "step": 6, "text": HOSTILE}, {"event": "start", "step": HOSTILE}]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    (folder / "errors").mkdir()
    message = json.dumps(HOSTILE)
    (folder / "errors/rank-0.txt").write_text(
        f"time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: <b>E</b>\nmessage: {message}\n\n"
    )
    return folder


class Markup(html.parser.HTMLParser):
    """What a browser would make of a page: its elements in order, and the texts of scripts and of all else."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def data(self) -> dict[str, Any]:
        """The values that the script of the page reads."""
        found: dict[str, Any] = json.loads(self.scripts[1])
        return found

    @property
    def text(self) -> str:
        """All text that is shown, in lines."""
        return "\n".join(self.texts)
