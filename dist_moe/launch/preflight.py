"""Looks at every host of a cluster before any worker starts, and says at once all that stands in the way."""

import json
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import Cluster, Host
from dist_moe.launch.command import LaunchError
from dist_moe.launch.supervise.protocol import Rendezvous

LIMIT_S = 60.0
SSH_FAILED = 255


def check_hosts(cluster: Cluster, config: Config, config_path: Path, rendezvous: Rendezvous) -> Cluster:
    """Ask every host at once -> the cluster with the cores of each.

    LaunchError with a line for each fault: the host, what is wrong, and what to do.

    Reachable by ssh and able to reach the launch; the same code and versions; the same configuration file; a run.dir
    that can be written, and is the one of the launch where storage is shared; the address and interface there; the
    port free on the first; as many GPUs as slots where the backend is nccl, and where "auto" is to choose it on some.
    """
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    mark = f".launch-{secrets.token_hex(8)}"
    (run_dir / mark).touch()
    try:
        question: dict[str, Any] = {
            "config": str(config_path),
            "run_dir": str(run_dir),
            "mark": mark if cluster.settings.shared_storage else None,
            "meeting": rendezvous[:2],
            "interface": cluster.settings.interface,
        }
        ask = {
            host: question
            | {"address": host.address, "port": cluster.settings.port if host is cluster.hosts[0] else None}
            for host in cluster.hosts
        }
        with ThreadPoolExecutor(max_workers=min(64, len(ask))) as pool:
            answers = dict(zip(ask, pool.map(lambda host: _ask(cluster, host, ask[host]), ask), strict=True))
    finally:
        (run_dir / mark).unlink(missing_ok=True)
    faults = [f"{host.name}: {answer}" for host, answer in answers.items() if isinstance(answer, str)]
    seen = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    for host, answer in seen.items():
        faults += [f"{host.name}: {fault}" for fault in _faults(cluster, config, config_path, host, answer)]
    faults += _differences(seen)
    faults += _too_few_devices(config.parallel.backend, seen)
    if faults:
        raise LaunchError("\n".join(["the cluster is not ready:", *faults]))
    return replace(cluster, hosts=tuple(replace(host, cores=seen[host]["cores"]) for host in cluster.hosts))


def _ask(cluster: Cluster, host: Host, question: dict[str, Any]) -> dict[str, Any] | str:
    """What the host says of itself, or why it says nothing."""
    probe = (cluster.python, "-m", "dist_moe.launch.probe")
    variables = {"PYTHONSAFEPATH": "1"}
    here = ("env", "-C", cluster.folder, *(f"{name}={value}" for name, value in variables.items()), *probe)
    argv = here if host.is_here else cluster.ssh(host, probe, variables)
    try:
        told = subprocess.run(
            argv, input=json.dumps(question), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except OSError as error:
        return f"cannot be asked ({error}); install what is missing on this host"
    except subprocess.TimeoutExpired:
        return f"does not answer within {LIMIT_S:g} s; see whether it is up, or leave it out (cluster.exclude)"
    last = (told.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if told.returncode == SSH_FAILED:
        return f"ssh cannot log in ({last}); try `ssh {host.name} true` by hand, or leave it out (cluster.exclude)"
    if told.returncode != 0:
        return (
            f"{cluster.python} cannot look around in {cluster.folder} ({last}); install the same environment at the "
            "same place, or set cluster.python and cluster.folder"
        )
    try:
        return dict(json.loads(told.stdout))
    except ValueError:
        return f"answered {told.stdout[:80]!r}; let its shell print nothing when it is not interactive"


def _faults(cluster: Cluster, config: Config, config_path: Path, host: Host, answer: dict[str, Any]) -> Iterator[str]:
    settings = cluster.settings
    if not answer["address"]:
        yield f"the address {host.address} is not its own; give the host's entry in cluster.hosts the right one"
    elif answer["port"]:
        yield f"port {settings.port} cannot be used ({answer['port']}); set cluster.port to a free one"
    if answer["meeting"]:
        yield f"it cannot reach the launch ({answer['rendezvous']}); open the firewall between them"
    if not answer["interface"]:
        yield f"it has no network interface {settings.interface}; set cluster.interface, or leave it out"
    if answer["config"].startswith("!"):
        yield f"{config_path} cannot be read there ({answer['config'][1:]}); copy it, or set cluster.folder"
    if answer["writable"]:
        yield f"run.dir={config.run.dir} cannot be written ({answer['writable']}); set another"
    elif not answer["mark"]:
        yield f"run.dir={config.run.dir} is not the same folder as here; share it, or set cluster.shared_storage=false"


def _too_few_devices(backend: str, answers: dict[Host, dict[str, Any]]) -> list[str]:
    """ "auto" is nccl where each worker has a GPU; hosts that disagree would not meet."""
    short = {host: answer["devices"] for host, answer in answers.items() if answer["devices"] <= max(host.devices)}
    if backend not in ("nccl", "auto") or (backend == "auto" and len(short) == len(answers)):
        return []
    remedy = "give fewer slots" if backend == "nccl" else "give fewer slots, or set parallel.backend=gloo"
    return [
        f"{host.name}: it has {count} GPUs for devices {list(host.devices)}; {remedy}" for host, count in short.items()
    ]


def _differences(answers: dict[Host, dict[str, Any]]) -> Sequence[str]:
    """What is not the same on all hosts."""
    found = []
    first = next(iter(answers), None)
    for host, answer in answers.items():
        if first is None or host is first:
            continue
        for name, version in answers[first]["versions"].items():
            if answer["versions"][name] != version:
                theirs = answer["versions"][name]
                found.append(f"{host.name}: {name} is {theirs}, and {version} on {first.name}; install the same")
        if answer["code"] != answers[first]["code"]:
            found.append(f"{host.name}: its dist_moe is not that of {first.name}; copy the same code to both")
        same = answer["config"] == answers[first]["config"] or "!" in answer["config"] + answers[first]["config"]
        if not same:
            found.append(f"{host.name}: its configuration file is not that of {first.name}; copy the same file to both")
    return found
