"""The objects of a job under Kubernetes: an Indexed Job, the service by which its pods find the first, and the rest.

No operator is needed: each pod is a host of torchrun, and its index is its rank among them.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_moe.config.load import dump_config
from dist_moe.config.schema import Config, KubernetesConfig
from dist_moe.launch.command import LaunchError

APPLY_LIMIT_S = 120.0
USER = 10001
CONFIG_FOLDER, RUNS_FOLDER = "/etc/dist-moe", "/runs"
TENSORBOARD_PORT = 6006


def kubernetes_objects(config: Config) -> list[dict[str, Any]]:
    """The objects in the order to make them; run.dir is taken to lie in the claimed volume, /runs in the pods."""
    wanted = config.kubernetes
    objects = [_configuration(config), _service(wanted, config.cluster.port), _job(config)]
    return [*objects, *(_tensorboard(wanted) if wanted.tensorboard else [])]


def manifest(objects: Sequence[dict[str, Any]]) -> str:
    """The objects as one YAML file."""
    return yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True)


def apply(text: str) -> str:
    """Hand a manifest to `kubectl` -> what it says. LaunchError where it refuses."""
    if shutil.which("kubectl") is None:
        raise LaunchError(
            "--launcher kubernetes needs kubectl, not found on PATH; install it, or --dry-run and apply it"
        )
    argv = ["kubectl", "apply", "-f", "-"]
    try:
        told = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=APPLY_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"kubectl does not answer within {APPLY_LIMIT_S:g} s; see `kubectl cluster-info`") from None
    if told.returncode != 0:
        raise LaunchError(f"kubectl refused the objects: {told.stderr.strip()}")
    return told.stdout.strip()


def _named(wanted: KubernetesConfig, kind: str, version: str, name: str, **parts: Any) -> dict[str, Any]:
    where = {} if wanted.namespace is None else {"namespace": wanted.namespace}
    labels = {"app.kubernetes.io/name": "dist-moe", "app.kubernetes.io/instance": wanted.name}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **where, "labels": labels}, **parts}


def _configuration(config: Config) -> dict[str, Any]:
    """The whole configuration, with run.dir in the volume, and a number of threads.

    A pod's limit is a share of time: a worker that counts cores finds all those of the node, and would be throttled.
    """
    threads = _cores(config.kubernetes.cpu) // config.kubernetes.workers_per_pod
    changes: dict[str, Any] = {"dir": f"{RUNS_FOLDER}/{Path(config.run.dir).name}"}
    changes |= {"threads": max(1, int(threads))} if config.run.threads == "auto" else {}
    run = config.run.model_copy(update=changes)
    text = dump_config(config.model_copy(update={"run": run}))
    return _named(config.kubernetes, "ConfigMap", "v1", config.kubernetes.name, data={"run.yaml": text})


def _cores(quantity: str) -> float:
    """CPU cores, as Kubernetes writes them: 2, 1.5 or 500m."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _service(wanted: KubernetesConfig, port: int) -> dict[str, Any]:
    """Headless: it gives each pod a name, also before it is ready, since pods wait for each other to become so."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": wanted.name},
        "ports": [{"name": "meeting", "port": port}],
    }
    return _named(wanted, "Service", "v1", wanted.name, spec=spec)


def _job(config: Config) -> dict[str, Any]:
    wanted = config.kubernetes
    command = [
        *("python", "-m", "torch.distributed.run"),
        *(f"--nnodes={wanted.pods}", "--node-rank=$(JOB_COMPLETION_INDEX)"),
        *(f"--nproc-per-node={wanted.workers_per_pod}",),
        *(f"--master-addr={wanted.name}-0.{wanted.name}", f"--master-port={config.cluster.port}"),
        *("--module", "dist_moe", "train", f"{CONFIG_FOLDER}/run.yaml"),
    ]
    amounts = {"cpu": wanted.cpu, "memory": wanted.memory}
    amounts |= {"nvidia.com/gpu": str(wanted.gpus)} if wanted.gpus else {}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = {
        "name": "workers",
        "image": wanted.image,
        "command": command,
        "env": [{"name": "JOB_COMPLETION_INDEX", "valueFrom": index}],
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "configuration", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "runs", "mountPath": RUNS_FOLDER},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "automountServiceAccountToken": False,
        "subdomain": wanted.name,
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": [
            {"name": "configuration", "configMap": {"name": wanted.name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": wanted.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": wanted.shared_memory}},
        ],
    }
    spec = {
        "completionMode": "Indexed",
        "completions": wanted.pods,
        "parallelism": wanted.pods,
        "backoffLimit": wanted.retries,
        "template": {"metadata": {"labels": {"job-name": wanted.name}}, "spec": pod},
    }
    return _named(wanted, "Job", "batch/v1", wanted.name, spec=spec)


def _tensorboard(wanted: KubernetesConfig) -> list[dict[str, Any]]:
    name = f"{wanted.name}-tensorboard"
    labels = {"app": name}
    container = {
        "name": "tensorboard",
        "image": wanted.image,
        "command": ["tensorboard", "--bind_all", f"--port={TENSORBOARD_PORT}", f"--logdir={RUNS_FOLDER}"],
        "ports": [{"containerPort": TENSORBOARD_PORT}],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
        "readinessProbe": {"httpGet": {"path": "/", "port": TENSORBOARD_PORT}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "runs", "mountPath": RUNS_FOLDER, "readOnly": True}],
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": wanted.claim}}],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    deployment = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    service = {"selector": labels, "ports": [{"port": TENSORBOARD_PORT}]}
    return [
        _named(wanted, "Deployment", "apps/v1", name, spec=deployment),
        _named(wanted, "Service", "v1", name, spec=service),
    ]
