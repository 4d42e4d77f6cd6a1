"""Checks every host of a cluster before any worker starts, and reports all faults at once."""

import contextlib
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
from dist_moe.text import counted

LIMIT_S = 60.0
SSH_FAILED = 255


def check_hosts(cluster: Cluster, config: Config, config_path: Path, rendezvous: Rendezvous) -> Cluster:
    """Run the probe on all hosts concurrently, and return the cluster with the number of cores of each host.

    Each host must be reachable by ssh and reach the launch, have the code, versions and configuration file of the first
    host, be able to write run.dir, and own its address and interface. With shared storage its run.dir must be that of
    the launch. The port must be free on the first host. Each host needs as many GPUs as slots if the backend is nccl,
    or if "auto" would select nccl on another host.

    Args:
        cluster: The hosts.
        config: The configuration of the run.
        config_path: The path of its file.
        rendezvous: Where the launch listens.

    Raises:
        LaunchError: With one line for each fault: host, fault and remedy.
    """
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    mark = f".launch-{secrets.token_hex(8)}"
    (run_dir / mark).touch(exist_ok=False)
    try:
        question: dict[str, Any] = {
            "config": str(config_path),
            "run_dir": str(run_dir),
            "mark": mark if cluster.settings.shared_storage else None,
            "launch": rendezvous[:2],
            "interface": cluster.settings.interface,
        }
        questions = {
            host: question
            | {"address": host.address, "port": cluster.settings.port if host is cluster.hosts[0] else None}
            for host in cluster.hosts
        }
        # The pool waits for its threads, and they for ssh, which Ctrl-C ends first.
        with ThreadPoolExecutor(max_workers=min(64, len(questions))) as pool, _killed_on_interrupt() as running:
            found = pool.map(lambda host: _probe(cluster, host, questions[host], running), questions)
            answers = dict(zip(questions, found, strict=True))
    finally:
        (run_dir / mark).unlink(missing_ok=True)
    faults = [f"{host.name}: {answer}" for host, answer in answers.items() if isinstance(answer, str)]
    answered = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    for host, answer in answered.items():
        faults += [f"{host.name}: {fault}" for fault in _faults(cluster, config, config_path, host, answer)]
    faults += _differences(answered)
    faults += _too_few_devices(config.parallel.backend, answered)
    if faults:
        raise LaunchError("\n".join(["the cluster is not ready:", *faults]))
    return replace(cluster, hosts=tuple(replace(host, cores=answered[host]["cores"]) for host in cluster.hosts))


@contextlib.contextmanager
def _killed_on_interrupt() -> Iterator[list[subprocess.Popen[str]]]:
    """Give a list for processes, which Ctrl-C in the block kills."""
    running: list[subprocess.Popen[str]] = []
    try:
        yield running
    except KeyboardInterrupt:
        for process in running:
            process.kill()
        raise


def _probe(
    cluster: Cluster, host: Host, question: dict[str, Any], running: list[subprocess.Popen[str]]
) -> dict[str, Any] | str:
    """Return the answer of the probe on a host, or why there is none; add its process to `running`."""
    probe = (cluster.python, "-m", "dist_moe.launch.probe")
    variables = {"PYTHONSAFEPATH": "1"}
    local = ("env", "-C", cluster.folder, *(f"{name}={value}" for name, value in variables.items()), *probe)
    argv = local if host.is_here else cluster.ssh(host, probe, variables)
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        return f"the probe cannot be started ({error}); install what is missing on this host"
    running.append(process)
    try:
        output, errors = process.communicate(json.dumps(question), timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"does not answer within {LIMIT_S:g} s; check whether it is up, or leave it out (cluster.exclude)"
    last = (errors.strip().splitlines() or ["no output"])[-1]
    if process.returncode == SSH_FAILED:
        return f"ssh cannot log in ({last}); try `ssh {host.name} true` by hand, or leave it out (cluster.exclude)"
    if process.returncode != 0:
        return (
            f"{cluster.python} cannot run the probe in {cluster.folder} ({last}); install the same environment at the "
            "same path, or set cluster.python and cluster.folder"
        )
    try:
        return dict(json.loads(output))
    except ValueError:
        return f"the probe printed {output[:80]!r}; make its shell print nothing when it is not interactive"


def _faults(cluster: Cluster, config: Config, config_path: Path, host: Host, answer: dict[str, Any]) -> Iterator[str]:
    settings = cluster.settings
    if not answer["address"]:
        yield f"the address {host.address} is not its own; set the right one in its entry of cluster.hosts"
    elif answer["port"]:
        yield f"port {settings.port} cannot be used ({answer['port']}); set cluster.port to a free one"
    if answer["launch"]:
        yield f"it cannot reach the launch ({answer['launch']}); open the firewall between them"
    if not answer["interface"]:
        yield f"it has no network interface {settings.interface}; set another cluster.interface, or null"
    if answer["config"].startswith("!"):
        yield f"{config_path} cannot be read there ({answer['config'][1:]}); copy it, or set cluster.folder"
    if answer["writable"]:
        yield f"run.dir={config.run.dir} cannot be written ({answer['writable']}); set another"
    elif not answer["mark"]:
        yield f"run.dir={config.run.dir} is not the same folder as here; share it, or set cluster.shared_storage=false"


def _too_few_devices(backend: str, answers: dict[Host, dict[str, Any]]) -> list[str]:
    """Return a line for each host with too few GPUs.

    "auto" selects nccl where each worker has a GPU; hosts that select different backends wait for each other forever.
    """
    short = {host: answer["devices"] for host, answer in answers.items() if answer["devices"] <= max(host.devices)}
    if backend not in ("nccl", "auto") or (backend == "auto" and len(short) == len(answers)):
        return []
    remedy = "set fewer slots" if backend == "nccl" else "set fewer slots, or set parallel.backend=gloo"
    return [
        f"{host.name}: it has {counted(count, 'GPU')} for devices {list(host.devices)}; {remedy}"
        for host, count in short.items()
    ]


def _differences(answers: dict[Host, dict[str, Any]]) -> Sequence[str]:
    """Return a line for each difference from the first host."""
    found = []
    first = next(iter(answers), None)
    for host, answer in answers.items():
        if first is None or host is first:
            continue
        for name, version in answers[first]["versions"].items():
            if answer["versions"][name] != version:
                other = answer["versions"][name]
                found.append(f"{host.name}: {name} is {other}, and {version} on {first.name}; install the same")
        if answer["code"] != answers[first]["code"]:
            found.append(f"{host.name}: its dist_moe differs from that of {first.name}; install the same code on both")
        same = answer["config"] == answers[first]["config"] or "!" in answer["config"] + answers[first]["config"]
        if not same:
            found.append(
                f"{host.name}: its configuration file differs from that of {first.name}; copy the same file to both"
            )
    return found
