"""The folder `launch/`: written from the code, free of this machine's paths, and its commands."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_moe.cli.main import app
from dist_moe.config import load_config
from dist_moe.launch.command import LaunchError
from dist_moe.launch.launcher import LaunchRequest
from dist_moe.launch.scripts import all_files
from dist_moe.launch.template import fill_template, shell_command, shell_variable

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "launch"
BIN = Path(sys.executable).parent
CONFIG = "configs/quickstart.yaml"
SHELL_SCRIPTS = sorted(path.relative_to(FOLDER) for path in FOLDER.glob("*/*") if path.suffix in (".sh", ".sbatch"))


def tree(folder: Path) -> dict[str, tuple[str, bool]]:
    """Every file of a folder: path -> text, and whether it can be executed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_text(), os.access(path, os.X_OK)) for path in files}


def run(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(
        ["sh", FOLDER / script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20
    )


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A Python, and programs in its folder, that print their arguments and the variables of the workers."""
    names = "OMP_NUM_THREADS|MASTER_ADDR|MASTER_PORT|DS_ENV_FILE|DIST_MOE_VISIBLE_DEVICES|PYTHONSAFEPATH"
    for name in ("python3", "mpirun", "sbatch"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@"\nenv | grep -E "^({names})=" | sort\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path / "python3"


def test_the_folder_is_what_the_code_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["launch", CONFIG, "--write", str(tmp_path / "launch")])
    assert result.exit_code == 0, result.output
    assert (
        result.stdout
        == f"scripts for every launcher are in {tmp_path}/launch; {tmp_path}/launch/README.md says which to take\n"
    )
    assert tree(FOLDER) == tree(tmp_path / "launch"), f"run `dist-moe launch {CONFIG} --write launch`"


def test_a_dry_run_writes_no_scripts(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["launch", CONFIG, "--dry-run", "--write", str(tmp_path / "launch")])
    assert result.exit_code == 2 and "--dry-run writes nothing, and --write writes files" in result.stderr
    assert not (tmp_path / "launch").exists()


def test_no_file_depends_on_this_machine() -> None:
    machine = [str(ROOT), sys.prefix, str(Path.home()), socket.gethostname()]
    assert not [name for name, (text, _) in tree(FOLDER).items() if any(word in text for word in machine)]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=str)
def test_shellcheck_accepts(script: Path) -> None:
    done = subprocess.run(
        [BIN / "shellcheck", "--severity=warning", FOLDER / script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_kubernetes_manifest_is_valid() -> None:
    path = FOLDER / "kubernetes" / "job.yaml"
    subprocess.run([BIN / "kubernetes-validate", "--strict", path], check=True, stdout=subprocess.DEVNULL)


def test_readme_links_every_file() -> None:
    text = (FOLDER / "README.md").read_text()
    assert not [name for name in tree(FOLDER) if name != "README.md" and f"({name})" not in text]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_one_machine_hands_on_configuration_overrides_and_workers(launcher: str, stand_ins: Path) -> None:
    script = Path("one_machine") / f"{launcher}.sh"
    variables = {"CONFIG": "my runs/a.yaml", "WORKERS": "3", "THREADS": "2", "RANK": "7", "CUDA_VISIBLE_DEVICES": "5"}
    done = run(script, "run.dir=my runs/$x", "train.steps=2", PYTHON=str(stand_ins), **variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[words.index("train") :][:4] == ["train", "my runs/a.yaml", "run.dir=my runs/$x", "train.steps=2"]
    count = {"deepspeed": "--num_accelerators", "torchrun": "--nproc-per-node", "mpirun": "-n"}[launcher]
    assert words[words.index(count) + 1] == "3"
    assert "OMP_NUM_THREADS=2" in words and "PYTHONSAFEPATH=1" in words
    assert ("DIST_MOE_VISIBLE_DEVICES=5" in words) == (launcher == "deepspeed")


def test_several_hosts_by_torchrun(stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\na slots=2\n\nb  slots = 3  # big\nc\n")
    variables = {"PYTHON": str(stand_ins), "HOSTFILE": str(tmp_path / "hosts")}
    for host, slots, index in (("a", "2", "0"), ("b", "3", "1"), ("c", "1", "2")):
        words = run(Path("several_hosts/torchrun.sh"), HOST=host, **variables).stdout.splitlines()
        for name, value in {
            "--nnodes": "3",
            "--nproc-per-node": slots,
            "--master-addr": "a",
            "--master-port": "29500",
            "--node-rank": index,
            "--local-addr": host,
        }.items():
            assert words[words.index(name) + 1] == value
    unknown = run(Path("several_hosts/torchrun.sh"), HOST="d", **variables)
    assert unknown.returncode == 2 and "d is not in" in unknown.stderr


def test_several_hosts_by_mpirun(stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n")
    (tmp_path / "variables").write_text("OMP_NUM_THREADS=4\nTOKEN=t\n")
    variables = {"HOSTFILE": str(tmp_path / "hosts"), "ENVIRONMENT": str(tmp_path / "variables")}
    words = run(Path("several_hosts/mpirun.sh"), PYTHON=str(stand_ins), **variables).stdout.splitlines()
    assert words[0] == str(stand_ins.parent / "mpirun"), "the whole path"
    assert words[words.index("--hostfile") + 1] == str(tmp_path / "hosts")
    assert words[words.index("-n") + 1] == "5"
    forwarded = [words[place + 1] for place, word in enumerate(words) if word == "-x"]
    assert forwarded == ["MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "TOKEN"]
    assert {"MASTER_ADDR=a", "MASTER_PORT=29500", "OMP_NUM_THREADS=4"} <= set(words)


def test_several_hosts_by_deepspeed(stand_ins: Path) -> None:
    words = run(Path("several_hosts/deepspeed.sh"), "train.steps=2", PYTHON=str(stand_ins)).stdout.splitlines()
    assert words[1] == str(stand_ins.parent / "deepspeed")
    assert words[words.index("--hostfile") + 1] == str(FOLDER / "several_hosts" / "hostfile")
    assert words[words.index("--master_addr") + 1] == "node0"
    assert f"DS_ENV_FILE={FOLDER / 'several_hosts' / 'environment'}" in words


def test_files_have_the_hosts_nodes_and_threads_of_the_configuration() -> None:
    config = load_config(ROOT / CONFIG, ["run.threads=3", "cluster.interface=eth7", "slurm.nodes=4"])
    files = all_files(LaunchRequest(config, CONFIG, ("train.steps=$x",)))
    assert files["several_hosts/environment"] == (
        "OMP_NUM_THREADS=3\nPYTHONSAFEPATH=1\nGLOO_SOCKET_IFNAME=eth7\nNCCL_SOCKET_IFNAME=eth7\n"
    )
    assert "btl_tcp_if_include eth7" in files["several_hosts/mpirun.sh"]
    assert "THREADS=${THREADS:-3}" in files["one_machine/torchrun.sh"]
    assert "#SBATCH --nodes=4\n" in files["slurm/job.sbatch"]
    assert "'train.steps=$x' \"$@\"" in files["one_machine/torchrun.sh"]


def test_a_configuration_path_that_needs_quoting_is_refused() -> None:
    with pytest.raises(LaunchError, match="reaches a shell through a script"):
        all_files(LaunchRequest(load_config(ROOT / CONFIG), "my runs/a.yaml"))


def test_fill_template_removes_lines_without_a_value() -> None:
    assert "hosts" in fill_template("hostfile", hosts="a slots=1")
    assert "@" not in fill_template("hostfile", hosts=None)
    with pytest.raises(ValueError, match="no placeholder for color"):
        fill_template("hostfile", hosts="a", color="red")
    with pytest.raises(KeyError):
        fill_template("hostfile")


def test_shell_command_keeps_every_word() -> None:
    words = ["a b", "--flag", "it's $HOME", shell_variable("PORT")]
    script = f"PORT=1; printf '%s\\n' {shell_command(words)}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a b", "--flag", "it's $HOME", "1"]
    assert shlex.split(shell_command(["a", "--b"]).replace("\\\n", "")) == ["a", "--b"]
