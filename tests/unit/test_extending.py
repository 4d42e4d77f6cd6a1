"""The examples of docs/extending.md work exactly as they are printed there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.M | re.S)


def blocks_of(heading: str) -> list[re.Match[str]]:
    """The code blocks below a heading of the second level."""
    section = re.split(rf"^## {heading}$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1]
    return list(BLOCK.finditer(re.split(r"^## ", section, flags=re.M)[0]))


def apply_blocks(tree: Path, heading: str) -> list[list[str]]:
    """Write the files and apply the patches of a section to the tree -> the commands of the section."""
    commands = []
    for block in blocks_of(heading):
        if block["title"]:
            (tree / block["title"]).write_text(block["text"], encoding="utf-8")
        elif block["language"] == "diff":
            subprocess.run(["git", "apply", "-"], cwd=tree, input=block["text"], text=True, check=True)
        else:
            assert block["language"] == "sh", block[0]
            commands += [shlex.split(line) for line in block["text"].splitlines()]
    return commands


@pytest.fixture(name="tree")
def copied_tree(tmp_path: Path) -> Path:
    """A copy of the package and the configurations, outside of any repository."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dist_moe", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return tree


def run(tree: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the page on the copy."""
    program = {"dist-moe": ["-m", "dist_moe"], "python": []}[command[0]]
    return subprocess.run(
        [sys.executable, *program, *command[1:]],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "GIT_CEILING_DIRECTORIES": str(tree)},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_the_policy_trains_and_moves_the_bias(tree: Path) -> None:
    (command,) = apply_blocks(tree, "A balancing policy")
    done = run(tree, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "leaky_sign" in done.stdout
    (checkpoint,) = (tree / "runs" / "debug" / "checkpoints").glob("step-*")
    assert yaml.safe_load((checkpoint / "config.yaml").read_text())["balance"]["leak"] == 0.02
    (weights,) = (load_file(path) for path in (checkpoint / "model").glob("*.safetensors"))
    biases = [tensor for name, tensor in weights.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(bias_E.any() for bias_E in biases)


@pytest.mark.slow
def test_the_policy_with_a_memory_trains_and_saves_it(tree: Path) -> None:
    (command,) = apply_blocks(tree, "A policy with a memory")
    done = run(tree, command)
    assert done.returncode == 0, done.stdout + done.stderr
    (checkpoint,) = (tree / "runs" / "debug" / "checkpoints").glob("step-*")
    state = load_file(checkpoint / "state" / "balance.safetensors")
    memory = [tensor for name, tensor in state.items() if name.startswith("memory.average_error:")]
    assert len(memory) == 2 and all(average_E.any() for average_E in memory)


REFUSED = """
from dist_moe.config import ConfigError, load_config, resolve
for overrides in (
    ["balance.policy=loss_free"],
    ["balance.clip=2"],
    ["router.selection=threshold", "router.score=softmax"],
):
    try:
        resolve(load_config("configs/debug.yaml", overrides), workers=1)
    except ConfigError as error:
        print(error)
"""


def test_the_configuration_knows_the_policy_and_its_fields(tree: Path) -> None:
    apply_blocks(tree, "A balancing policy")
    done = run(tree, ["python", "-c", REFUSED])
    assert done.stdout.splitlines() == [
        "balance.leak=0.02 has no meaning with balance.policy=loss_free; leave it out, or use "
        "balance.policy=leaky_sign",
        "balance.clip=2 has no meaning with balance.policy=leaky_sign; leave it out, or use "
        "balance.policy=adaptive_weight",
        "balance.policy=leaky_sign was not tried with threshold routing; set router.selection=top_k",
    ], done.stderr


@pytest.mark.slow
def test_the_family_computes_what_hugging_face_does(tree: Path) -> None:
    (command,) = apply_blocks(tree, "A model family")
    done = run(tree, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("Qwen2MoeForCausalLM: equal logits")
