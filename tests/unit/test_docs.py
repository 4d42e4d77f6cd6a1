"""The documentation is true: marks, commands, options, paths, overrides, YAML and links."""

import re
from pathlib import Path

import pytest
import yaml

from dist_moe.config import Config, ConfigError, load_config
from dist_moe.config.messages import field_paths
from tests.command_line import parse
from tests.documents import (
    ROOT,
    Block,
    all_blocks,
    anchors,
    arguments_of_dist_moe,
    blocks,
    links,
    markdown_files,
    simple_commands,
)

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
FOLDERS = "configs|launch|examples|docker|docs|tests|benchmarks"
SUFFIXES = {"json", "jsonl", "tsv", "csv", "yaml", "py", "sh", "txt", "safetensors"}
"""What follows a dot in the name of a file, such as run.json, and not of a field."""
SHELLS = {"bash", "shell", "console", "zsh", "shell-session"}


def tasks() -> set[str]:
    """The targets of the Makefile that are tasks."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony
    return set(phony[1].split())


def faults_of_overrides(overrides: list[str], config: Path) -> str:
    """What the schema says against overrides of a file; "" where it accepts them."""
    base = ROOT / config if (ROOT / config).is_file() else QUICKSTART
    try:
        load_config(base, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def faults(command: list[str]) -> list[str]:
    """What is wrong with one command of the documentation."""
    found = []
    for word in command:
        path = word.rpartition("=")[2].removeprefix("./")
        if re.match(rf"({FOLDERS})/[\w./-]+$", path) and not (ROOT / path).exists():
            found.append(f"{path} does not exist")
    if command[0] == "make":
        found += faults_of_make(command)
    arguments = arguments_of_dist_moe(command)
    if arguments is not None:
        try:
            parameters = parse(arguments)
        except Exception as error:  # usage errors of the command line's own library, and assertions
            return [*found, f"{error!r} {error}"]
        overrides = list(parameters.get("overrides") or ())
        found += filter(None, [faults_of_overrides(overrides, Path(parameters.get("config") or QUICKSTART))])
    return found


def faults_of_make(command: list[str]) -> list[str]:
    """What is wrong with a call of make: tasks that do not exist, and overrides in ARGS."""
    variables = dict(word.split("=", 1) for word in command[1:] if "=" in word)
    targets = [word for word in command[1:] if "=" not in word and not word.startswith("-")]
    found = [f"make has no task {target}" for target in targets if target not in tasks()]
    if targets == ["train"]:
        overrides = [word for word in variables.get("ARGS", "").split() if re.match(r"\w+\.\w+=", word)]
        found += filter(None, [faults_of_overrides(overrides, Path(variables.get("CONFIG", QUICKSTART)))])
    return found


def without_a_mark() -> list[str]:
    return [str(block) for block in all_blocks() if block.language == "sh" and not (block.run or block.reason)]


def test_every_block_of_commands_is_marked_as_run_or_not_run() -> None:
    assert not without_a_mark(), "put `<!-- run -->` or `<!-- not run: REASON -->` on the line above each"


def test_commands_are_in_blocks_of_sh() -> None:
    assert not [str(block) for block in all_blocks() if block.language in SHELLS], "use ```sh"
    marked = [block for block in all_blocks() if (block.run or block.reason) and block.language != "sh"]
    assert not [str(block) for block in marked], "only blocks of sh have a mark"


@pytest.mark.parametrize("path", markdown_files(), ids=str)
def test_every_command_parses_and_its_targets_paths_and_overrides_exist(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    shown = re.findall(r'^```python title="dist_moe/launch/launchers/(\w+)\.py"$', text, re.M)
    found = [
        f"{block}: {' '.join(command)}: {fault}"
        for block in blocks(path)
        if block.language in ("sh", "", "text", "console")
        for command in block.commands()
        # A launcher that the page adds is not in this tree; one that is stands for it.
        for fault in faults(["torchrun" if word in shown else word for word in command])
    ]
    assert not found, "\n".join(found)


def test_every_yaml_block_of_a_run_is_accepted_by_the_schema(tmp_path: Path) -> None:
    checked = 0
    for block in all_blocks():
        given = yaml.safe_load(block.text) if block.language == "yaml" else None
        if not isinstance(given, dict) or not set(given) <= set(Config.model_fields):
            continue
        whole = yaml.safe_load(QUICKSTART.read_text())
        for section, keys in given.items():
            whole.setdefault(section, {}).update(keys)
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(whole))
        load_config(file)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("path", markdown_files(), ids=str)
def test_every_field_that_the_text_names_exists(path: Path) -> None:
    sections = "|".join(Config.model_fields)
    named = re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)", (ROOT / path).read_text())
    fields = {".".join(field.split(".")[:2]) for field in field_paths()}
    unknown = {name for name in named if name.rpartition(".")[2] not in SUFFIXES} - fields
    assert not unknown, f"{path} names {sorted(unknown)}"


@pytest.mark.parametrize("path", [*markdown_files(), Path("CHANGELOG.md"), Path("SECURITY.md")], ids=str)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target, anchor in links(path):
        place = (ROOT / path.parent / target).resolve() if target else ROOT / path
        assert place.exists(), f"{path} links to {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place.relative_to(ROOT)), f"{path} links to {target}#{anchor}"


@pytest.mark.parametrize(
    "line",
    [
        "dist-moe lunch configs/quickstart.yaml",
        "dist-moe launch configs/quickstart.yaml --werkers 2",
        "dist-moe launch configs/quickstart.yaml --workers two",
        "dist-moe launch configs/quickstart.yaml train.stepz=3",
        "A=1 deepspeed --module dist_moe train configs/no-such.yaml",
        "torchrun -m dist_moe train configs/quickstart.yaml train.steps=many",
        "make no-such-task",
        'make train ARGS="balance.policy=nothing run.dir=runs/x"',
        "cat configs/no-such.yaml",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert faults(simple_commands(line)[0])


def test_commands_are_cut_at_operators_comments_and_prompts() -> None:
    text = "export A=1  # note\nB=2 dist-moe train x.yaml \\\n  a.b=[1,2] | tee log && make test"
    block = Block(Path("x.md"), 1, "sh", False, "", text)
    assert block.commands() == [
        ["export", "A=1"],
        ["B=2", "dist-moe", "train", "x.yaml", "a.b=[1,2]"],
        ["tee", "log"],
        ["make", "test"],
    ]
    transcript = Block(Path("x.md"), 1, "", False, "", "$ dist-moe --help\noutput of it\n")
    assert transcript.commands() == [["dist-moe", "--help"]]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("FOO=1 .venv/bin/dist-moe train x.yaml", ["train", "x.yaml"]),
        ("torchrun --nproc-per-node 2 -m dist_moe train x.yaml", ["train", "x.yaml"]),
        ("docker run --rm dist-moe:cpu config x.yaml", ["config", "x.yaml"]),
        ("pip uninstall dist-moe", None),
        ("make train", None),
    ],
)
def test_the_arguments_of_dist_moe_are_found(line: str, arguments: list[str] | None) -> None:
    assert arguments_of_dist_moe(simple_commands(line)[0]) == arguments
