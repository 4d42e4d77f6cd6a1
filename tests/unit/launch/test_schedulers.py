"""The batch script for Slurm and the manifest for Kubernetes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_moe.config import Config, load_config
from dist_moe.launch.command import LaunchError
from dist_moe.launch.launcher import LaunchRequest
from dist_moe.launch.launchers.kubernetes import manifest
from dist_moe.launch.launchers.slurm import LAUNCHER as SLURM

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"
BIN = Path(sys.executable).parent


def config(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


def slurm_script(config: Config, path: str | Path = CONFIG, overrides: Sequence[str] = ()) -> str:
    return SLURM.script(LaunchRequest(config, path, overrides))


def objects_of(config: Config) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest(config)))


def test_slurm_script_has_the_options_of_the_configuration() -> None:
    text = slurm_script(
        config(
            "slurm.nodes=2", "slurm.tasks_per_node=4", "slurm.gpus_per_node=4", "slurm.minutes=90", "slurm.signal_s=60"
        )
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


def test_slurm_script_passes_shellcheck_and_quotes_every_value(tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    nasty = f"it's $(touch {struck}); touch {struck}"
    text = slurm_script(config(f"cluster.folder={tmp_path}"), nasty, [f"run.dir={nasty}"])
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run([BIN / "shellcheck", "--severity=warning", script], check=True)
    # Scripts in the place of the programs print what they are given.
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


def test_slurm_script_refuses_a_run_folder_that_needs_quoting() -> None:
    with pytest.raises(LaunchError, match="reaches a shell through an #SBATCH line"):
        slurm_script(config("run.dir=my runs"))


def test_slurm_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="needs sbatch, which is not on PATH"):
        SLURM.submit(LaunchRequest(config(f"run.dir={tmp_path}"), CONFIG), "")


@pytest.mark.parametrize("overrides", [[], ["kubernetes.gpus=8", "kubernetes.namespace=team", "kubernetes.pods=5"]])
def test_manifest_is_valid(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(manifest(config(*overrides)))
    subprocess.run([BIN / "kubernetes-validate", "--strict", path], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        ([], "kubectl port-forward deployment/dist-moe-tensorboard 6006"),
        (
            ["kubernetes.namespace=team"],
            "kubectl port-forward --namespace team deployment/dist-moe-tensorboard 6006",
        ),
    ],
)
def test_manifest_says_how_to_reach_its_tensorboard(overrides: list[str], command: str) -> None:
    text = manifest(config(*overrides))
    assert f"so it listens in its pod alone:\n#   {command}\napiVersion" in text


def test_manifest_pods_meet_at_the_first_and_read_the_whole_configuration() -> None:
    objects = {each["kind"]: each for each in objects_of(config("run.dir=runs/x"))}
    spec = objects["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    (container,) = spec["template"]["spec"]["containers"]
    assert "--master-addr=dist-moe-0.dist-moe" in container["command"]
    assert spec["template"]["spec"]["subdomain"] == "dist-moe"
    assert yaml.safe_load(objects["ConfigMap"]["data"]["run.yaml"])["run"]["dir"] == "/runs/x"


def test_pods_hold_to_the_restricted_standard_and_policies_keep_strangers_out() -> None:
    objects = objects_of(config())
    for each in objects:
        if each["kind"] not in ("Job", "Deployment"):
            continue
        pod = each["spec"]["template"]["spec"]
        security, (container,) = pod["securityContext"], pod["containers"]
        assert security["runAsNonRoot"] is True and security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not pod["automountServiceAccountToken"] and "--bind_all" not in container["command"]
    policies = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    of_job = {"podSelector": {"matchLabels": {"job-name": "dist-moe"}}}
    assert policies["dist-moe"] == {"policyTypes": ["Ingress"], "ingress": [{"from": [of_job]}], **of_job}
    assert "ingress" not in policies["dist-moe-tensorboard"], "nobody"
    (service,) = [each for each in objects if each["kind"] == "Service"]
    assert service["metadata"]["name"] == "dist-moe"


@pytest.mark.parametrize(("cpu", "threads"), [("8", 4), ("7.5", 3), ("500m", 1), ("6500m", 3)])
def test_manifest_divides_the_limit_of_a_pod_among_its_workers(cpu: str, threads: int) -> None:
    def configured(*overrides: str) -> int:
        two_workers = config(f"kubernetes.cpu={cpu}", "kubernetes.workers_per_pod=2", *overrides)
        return yaml.safe_load(objects_of(two_workers)[0]["data"]["run.yaml"])["run"]["threads"]

    assert configured() == threads
    assert configured("run.threads=5") == 5


@pytest.mark.parametrize(
    "override", ["kubernetes.cpu=2Gi", "kubernetes.name=Bad_Name", "kubernetes.memory=lots", "kubernetes.image='a b'"]
)
def test_configuration_refuses_names_that_kubernetes_refuses(override: str) -> None:
    from dist_moe.errors import ConfigError

    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config(override)
