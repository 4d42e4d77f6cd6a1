"""What Slurm and Kubernetes are given: a script that bash and shellcheck accept, objects that the schemas accept."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_moe.config import Config, load_config
from dist_moe.launch.command import LaunchError
from dist_moe.launch.launchers.kubernetes import kubernetes_objects, manifest
from dist_moe.launch.launchers.slurm import slurm_script, submit

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"
BIN = Path(sys.executable).parent


def config(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


def test_the_script_asks_for_what_the_file_says() -> None:
    text = slurm_script(
        config(
            "slurm.nodes=2", "slurm.tasks_per_node=4", "slurm.gpus_per_node=4", "slurm.minutes=90", "slurm.signal_s=60"
        ),
        CONFIG,
    )
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=90",
        "--signal=B:USR1@60",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "partition" not in text and "account" not in text


def test_bash_and_shellcheck_take_the_script_and_nothing_in_it_is_code(tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    nasty = f"it's $(touch {struck}); touch {struck}"
    text = slurm_script(config(f"cluster.folder={tmp_path}"), nasty, [f"run.dir={nasty}"])
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run([BIN / "shellcheck", "--severity=warning", script], check=True)
    # What srun would be given, by a script in its place.
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    (stand_in / "scontrol").write_text("#!/bin/sh\necho node0\n")
    (stand_in / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\nenv | grep MASTER\n')
    for program in stand_in.iterdir():
        program.chmod(0o755)
    environment = {"PATH": f"{stand_in}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True, timeout=20)
    assert f"train\n{nasty}\nrun.dir={nasty}\n" in done.stdout
    assert "MASTER_ADDR=node0\n" in done.stdout and "MASTER_PORT=29500\n" in done.stdout
    assert not struck.exists()


def test_a_run_folder_that_a_directive_cannot_hold_is_refused() -> None:
    with pytest.raises(LaunchError, match="reaches a shell through a #SBATCH line"):
        slurm_script(config("run.dir=my runs"), CONFIG)


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="needs sbatch, not found on PATH"):
        submit(config(f"run.dir={tmp_path}"), "")


@pytest.mark.parametrize("overrides", [[], ["kubernetes.gpus=8", "kubernetes.namespace=team", "kubernetes.pods=5"]])
def test_the_schemas_accept_every_object(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(manifest(kubernetes_objects(config(*overrides))))
    subprocess.run([BIN / "kubernetes-validate", "--strict", path], check=True, stdout=subprocess.DEVNULL)


def test_the_pods_meet_at_the_first_and_read_the_whole_configuration() -> None:
    objects = {one["kind"]: one for one in yaml.safe_load_all(manifest(kubernetes_objects(config("run.dir=runs/x"))))}
    spec = objects["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    (container,) = spec["template"]["spec"]["containers"]
    assert "--master-addr=dist-moe-0.dist-moe" in container["command"]
    assert spec["template"]["spec"]["subdomain"] == "dist-moe"
    assert yaml.safe_load(objects["ConfigMap"]["data"]["run.yaml"])["run"]["dir"] == "/runs/x"


@pytest.mark.parametrize(("cpu", "threads"), [("8", 4), ("7.5", 3), ("500m", 1), ("6500m", 3)])
def test_a_pods_workers_share_its_limit_and_not_the_nodes_cores(cpu: str, threads: int) -> None:
    def configured(*overrides: str) -> int:
        one = config(f"kubernetes.cpu={cpu}", "kubernetes.workers_per_pod=2", *overrides)
        return yaml.safe_load(kubernetes_objects(one)[0]["data"]["run.yaml"])["run"]["threads"]

    assert configured() == threads
    assert configured("run.threads=5") == 5


@pytest.mark.parametrize(
    "override", ["kubernetes.cpu=2Gi", "kubernetes.name=Bad_Name", "kubernetes.memory=lots", "kubernetes.image='a b'"]
)
def test_names_that_kubernetes_refuses_stop_here(override: str) -> None:
    from dist_moe.errors import ConfigError

    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config(override)
