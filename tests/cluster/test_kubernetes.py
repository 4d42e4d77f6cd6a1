"""The manifest of `launch/kubernetes` as a cluster would run it: its commands, users, mounts and names, under podman.

Options of podman do what Kubernetes does for a pod; tests/unit validates the objects against the schemas.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_moe.config import dump_config, load_config
from tests.cluster.conftest import ROOT, Images
from tests.cluster.engine import BUILD_LIMIT_S, Engine
from tests.cluster.test_launchers import assert_close_losses, losses

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)

NETWORK = "cluster"
UNITS = {"Ki": "k", "Mi": "m", "Gi": "g"}
END_LIMIT_S = 300.0
READY_LIMIT_S = 60.0

Objects = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def objects(images: Images) -> Objects:
    """The objects by kind, as written for two pods, but for the image that is here and the shorter debug run."""
    written = (ROOT / "launch" / "kubernetes" / "job.yaml").read_text()
    # Of the two Services, that of the Job is the first.
    found = {each["kind"]: each for each in reversed(list(yaml.safe_load_all(written)))}
    config = load_config(ROOT / "configs" / "debug.yaml", ["run.dir=/runs/debug", "run.threads=1"])
    found["ConfigMap"]["data"]["run.yaml"] = dump_config(config)
    for kind in ("Job", "Deployment"):
        (container,) = found[kind]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "dist-moe:cpu"
        container["image"] = images.cpu
    return found


@pytest.fixture(scope="module")
def node(images: Images, objects: Objects, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A network for the pods, and a folder with the ConfigMap's files and the claimed volume."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "configuration").mkdir()
    for name, text in objects["ConfigMap"]["data"].items():
        (folder / "configuration" / name).write_text(text)
    (folder / "claimed").mkdir()
    images.engine.podman("network", "create", NETWORK)
    yield folder
    images.engine.podman("network", "rm", "--force", "--time", "1", NETWORK)


def start(engine: Engine, pod: dict[str, Any], node: Path, name: str, annotations: dict[str, str]) -> str:
    """Run the only container of a pod as the pod describes it; return its id."""
    (container,) = pod["containers"]
    variables = {each["name"]: value(each, annotations) for each in container.get("env", [])}
    command = [expanded(word, variables) for word in container["command"]]
    security = container["securityContext"]
    assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] != 0
    group = pod["securityContext"]["fsGroup"]
    claim_of(node, group)
    names = [f"{name}.{pod['subdomain']}"] if "subdomain" in pod else []
    options = [
        *("--detach", "--network", NETWORK, "--hostname", name, "--name", name),
        *(f"--network-alias={alias}" for alias in names),
        *("--user", str(pod["securityContext"]["runAsUser"]), "--group-add", str(group)),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--memory", bytes_of(container["resources"]["limits"]["memory"])),
        *(f"--env={key}={each}" for key, each in variables.items()),
        *mounts(pod, container, node),
        *("--entrypoint", json.dumps(command[:1])),
    ]
    return engine.podman("run", *options, container["image"], *command[1:])


def value(variable: dict[str, Any], annotations: dict[str, str]) -> str:
    """Return the value of an environment variable: its own, or that of the pod's annotation."""
    if "value" in variable:
        return str(variable["value"])
    path = re.fullmatch(r"metadata\.annotations\['(.*)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
    assert path is not None
    return annotations[path[1]]


def expanded(word: str, variables: dict[str, str]) -> str:
    """Replace $(NAME) by the value of the variable, if there is one."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word)


def bytes_of(quantity: str) -> str:
    """Return 4Gi in the notation of podman."""
    return quantity[:-2] + UNITS[quantity[-2:]]


def claim_of(node: Path, group: int) -> None:
    """Change a volume as fsGroup does."""
    subprocess.run(["chgrp", str(group), node / "claimed"], check=True)
    (node / "claimed").chmod(0o2775)


def mounts(pod: dict[str, Any], container: dict[str, Any], node: Path) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume, end = volumes[mount["name"]], ":ro" if mount.get("readOnly") else ""
        if mount["mountPath"] == "/dev/shm":
            yield f"--shm-size={bytes_of(volume['emptyDir']['sizeLimit'])}"
        elif "configMap" in volume:
            yield f"--volume={node}/configuration:{mount['mountPath']}:ro"
        else:
            assert "persistentVolumeClaim" in volume
            yield f"--volume={node}/claimed:{mount['mountPath']}{end}"


def test_the_pods_of_the_job_train_together_to_the_end(
    images: Images, objects: Objects, node: Path, alone_in_a_container: Path
) -> None:
    job = objects["Job"]["spec"]
    pod, name = job["template"]["spec"], objects["Job"]["metadata"]["name"]
    assert pod["subdomain"] == objects["Service"]["metadata"]["name"]
    pods = [f"{name}-{index}" for index in range(job["completions"])]
    # The last one first: Kubernetes starts pods in any order.
    for index, hostname in reversed(list(enumerate(pods))):
        annotation = {"batch.kubernetes.io/job-completion-index": str(index)}
        start(images.engine, pod, node, hostname, annotation)
    codes = images.engine.podman("wait", *pods, limit_s=END_LIMIT_S).split()
    logs = [images.engine.run("podman", "logs", each) for each in pods]
    assert codes == ["0", "0"], [log.output[-3000:] + log.errors[-3000:] for log in logs]
    run_dir = node / "claimed" / "debug"
    assert json.loads((run_dir / "run.json").read_text())["world"]["workers"] == 2
    found, alone = losses(run_dir), losses(alone_in_a_container)
    assert_close_losses(found, alone)
    assert "2 workers, expert parallel 2" in logs[0].output, "rank 0 is the first pod's"


def test_tensorboard_gets_ready_and_reads_the_claimed_volume(images: Images, objects: Objects, node: Path) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    number = start(images.engine, pod, node, "tensorboard", {})
    probe = pod["containers"][0]["readinessProbe"]["exec"]["command"]
    deadline = time.monotonic() + READY_LIMIT_S
    while images.engine.run("podman", "exec", number, *probe).code != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    url = "http://127.0.0.1:6006/data/plugin/scalars/tags"
    read = f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())"
    tags = json.loads(images.engine.podman("exec", number, "python", "-c", read))
    assert "1_overview/loss" in tags["debug"]
