"""The scheduler Kubernetes: an Indexed Job, the Service by which its pods find the first one, and a TensorBoard.

No operator is needed: each pod is a host of torchrun, and its index is its node rank.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from dist_moe.config.load import dump_config
from dist_moe.config.schema import Config
from dist_moe.launch.command import LaunchError
from dist_moe.launch.launcher import LaunchRequest, Scheduler
from dist_moe.launch.template import fill_template

APPLY_LIMIT_S = 120.0
# The user of the image, see docker/Dockerfile.
USER = 10001
RUNS_FOLDER = "/runs"


class KubernetesLauncher(Scheduler):
    """An Indexed Job with one pod for each host."""

    summary = "a Kubernetes cluster, without an operator"
    workers_fields = "kubernetes.pods and kubernetes.workers_per_pod"

    def workers(self, request: LaunchRequest) -> int:
        """Return the number of workers in all pods."""
        return request.config.kubernetes.pods * request.config.kubernetes.workers_per_pod

    def script(self, request: LaunchRequest) -> str:
        """Return the manifest, with the whole configuration in a ConfigMap."""
        return manifest(request.config)

    def submit(self, request: LaunchRequest, script: str) -> str:
        """Apply the manifest by `kubectl` and return its answer.

        Raises:
            LaunchError: There is no `kubectl`, or it refuses the manifest.
        """
        if shutil.which("kubectl") is None:
            raise LaunchError(
                "--launcher kubernetes needs kubectl, which is not on PATH; install it, or use --dry-run and apply the "
                "manifest elsewhere"
            )
        argv = ["kubectl", "apply", "-f", "-"]
        try:
            answer = subprocess.run(
                argv, input=script, capture_output=True, text=True, timeout=APPLY_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(
                f"kubectl does not answer within {APPLY_LIMIT_S:g} s; check `kubectl cluster-info`"
            ) from None
        if answer.returncode != 0:
            raise LaunchError(f"kubectl refused the manifest: {answer.stderr.strip()}")
        return answer.stdout.strip()

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return the manifest."""
        return {"kubernetes/job.yaml": manifest(request.config)}


def manifest(config: Config) -> str:
    """Return the objects as one YAML file, in the order in which they are created.

    In the pods, run.dir is the folder of its name in the claimed volume.
    """
    wanted = config.kubernetes
    common = {"name": wanted.name, "namespace": wanted.namespace}
    pod = {"image": wanted.image, "user": USER, "runs": RUNS_FOLDER, "claim": wanted.claim}
    parts = [
        fill_template(
            "kubernetes/configmap.yaml", **common, configuration=indent(pod_config(config), " " * 4).rstrip("\n")
        ),
        fill_template("kubernetes/service.yaml", **common, port=config.cluster.port),
        fill_template("kubernetes/networkpolicy.yaml", **common, port=config.cluster.port),
        fill_template(
            "kubernetes/job.yaml",
            **common,
            **pod,
            pods=wanted.pods,
            workers=wanted.workers_per_pod,
            port=config.cluster.port,
            cpu=wanted.cpu,
            memory=wanted.memory,
            gpus=wanted.gpus or None,
            shared_memory=wanted.shared_memory,
            retries=wanted.retries,
        ),
    ]
    if wanted.tensorboard:
        option = "" if wanted.namespace is None else f" --namespace {wanted.namespace}"
        parts.append(fill_template("kubernetes/tensorboard.yaml", **common, **pod, option=option))
    return "---\n".join(parts)


def pod_config(config: Config) -> str:
    """Return the whole configuration as YAML, with run.dir in the claimed volume and a number of threads.

    A pod's CPU limit is a share of time: a worker that counts cores finds all those of the node, and is throttled.
    """
    threads = _cores(config.kubernetes.cpu) // config.kubernetes.workers_per_pod
    changes: dict[str, Any] = {"dir": f"{RUNS_FOLDER}/{Path(config.run.dir).name}"}
    changes |= {"threads": max(1, int(threads))} if config.run.threads == "auto" else {}
    return dump_config(config.model_copy(update={"run": config.run.model_copy(update=changes)}))


def _cores(quantity: str) -> float:
    """Return CPU cores from the notation of Kubernetes: 2, 1.5 or 500m."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


LAUNCHER = KubernetesLauncher()
