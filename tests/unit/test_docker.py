"""The Dockerfile, the compose file and the shell scripts pass the linters and agree with the code."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from dist_moe.launch.launchers.kubernetes import USER

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = ("docker/sshd.sh", "tests/browser/packages.sh", "tests/cluster/packages.sh")


def lint(program: str, *arguments: str) -> None:
    done = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_accepts_the_dockerfile() -> None:
    lint("hadolint", "docker/Dockerfile")


def test_yamllint_accepts_the_compose_file() -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    lint("yamllint", "--strict", "-d", rules, "docker/compose.yaml")


def test_shellcheck_accepts_the_scripts() -> None:
    lint("shellcheck", *SCRIPTS)


def test_dockerignore_sends_what_the_dockerfile_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    sent = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(name for line in copied for name in line.split()) == sorted(sent)
    assert all((ROOT / name).exists() for name in sent)


def test_the_base_is_named_by_its_digest() -> None:
    first = re.search(r"^ARG .*$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert first and re.fullmatch(r"ARG BASE=python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", first[0])


def test_pods_run_as_the_user_of_the_image() -> None:
    assert f"USER {USER}:{USER}\n" in (ROOT / "docker" / "Dockerfile").read_text()


def test_workers_of_the_compose_file_differ_only_in_their_rank() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    first, second = services["worker0"], services["worker1"]
    assert (first["environment"].pop("PET_NODE_RANK"), second["environment"].pop("PET_NODE_RANK")) == ("0", "1")
    assert second.pop("depends_on") == ["worker0"]
    assert first == second
