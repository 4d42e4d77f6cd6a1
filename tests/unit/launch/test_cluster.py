"""The commands for several hosts: what they quote, what they carry, and what they refuse."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import Config, load_config
from dist_moe.errors import ConfigError
from dist_moe.launch.cluster import Cluster, read_cluster
from dist_moe.launch.command import Command, LaunchError
from dist_moe.launch.job import Job
from dist_moe.launch.launchers.deepspeed import deepspeed_cluster_command
from dist_moe.launch.launchers.mpirun import mpirun_cluster_command, subnet
from dist_moe.launch.launchers.torchrun import torchrun_cluster_command

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"
HOSTS = "cluster.hosts=[{name: a, slots: 2, address: 203.0.113.1}, {name: b, slots: 2, address: 203.0.113.2}]"
NASTY = "x\"; touch /tmp/struck; $(touch /tmp/struck) `touch /tmp/struck` ' %n"
MAKERS: dict[str, Callable[..., Command]] = {
    "torchrun": torchrun_cluster_command,
    "mpirun": mpirun_cluster_command,
    "deepspeed": deepspeed_cluster_command,
}


def job(tmp_path: Path, *overrides: str) -> tuple[Config, Cluster]:
    config = load_config(CONFIG, [HOSTS, f"run.dir={tmp_path}", *overrides])
    cluster = read_cluster(config.cluster)
    assert cluster
    return config, cluster


def words_there(command: Command) -> list[str]:
    """What the shell of the second host makes of its command, without running it."""
    return shlex.split(command.remote_commands[0][-1])


def test_the_file_says_which_hosts_and_in_which_order(tmp_path: Path) -> None:
    _, cluster = job(tmp_path, "cluster.exclude=b:0")
    assert [(host.name, host.devices, host.address) for host in cluster.hosts] == [
        ("a", (0, 1), "203.0.113.1"),
        ("b", (1,), "203.0.113.2"),
    ]
    assert cluster.workers == 3
    assert read_cluster(load_config(CONFIG).cluster) is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cluster.hostfile=hosts"], "are both set; set one of the two"),
        (["cluster.hosts=[{name: a}, {name: a}]"], "a name twice"),
        (["cluster.hosts=[{name: no-such-host.invalid}]"], "means no address here"),
        (["cluster.hosts=[{name: localhost}, {name: b, address: 203.0.113.2}]"], "give the first host's own address"),
    ],
)
def test_hosts_that_cannot_be_are_refused(overrides: Sequence[str], told: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_cluster(load_config(CONFIG, [HOSTS, *overrides]).cluster)
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["-oProxyCommand=reboot", "a b", "$(reboot)", ""])
def test_a_name_that_is_none_stops_at_the_configuration(name: str) -> None:
    for key in ("ssh_user", "interface"):
        with pytest.raises(ConfigError, match=rf"cluster\.{key}="):
            load_config(CONFIG, [f"cluster.{key}={name!r}"])


def test_torchrun_quotes_whatever_reaches_another_hosts_shell(tmp_path: Path) -> None:
    config, cluster = job(
        tmp_path, "cluster.environment=[SECRET]", f"cluster.folder={json.dumps(NASTY)}", "cluster.ssh_port=2222"
    )
    command = torchrun_cluster_command(
        config, cluster, NASTY, [f"run.dir={NASTY}"], base={"SECRET": NASTY, "OTHER": "1"}
    )
    (ssh,) = command.remote_commands
    assert ssh[0] == "ssh" and ssh[-2] == "b" and ssh[-4:-2] == ("-p", "2222")
    found = words_there(command)
    assert found[:4] == ["cd", NASTY, "&&", "exec"]
    assert f"SECRET={NASTY}" in found and found[-2:] == [NASTY, f"run.dir={NASTY}"]
    assert not any(word.startswith("OTHER=") for word in found), "nothing goes along unasked"


def test_each_host_is_given_its_devices_and_its_own_address(tmp_path: Path) -> None:
    config, cluster = job(tmp_path, "cluster.include=a@b:1")
    command = torchrun_cluster_command(config, cluster, "a.yaml", restarts=3, fewest=1)
    there = words_there(command)
    assert "CUDA_VISIBLE_DEVICES=1" in there
    for name, value in (("--nnodes", "1:2"), ("--nproc-per-node", "1"), ("--local-addr", "203.0.113.2")):
        assert there[there.index(name) + 1] == value
    assert there[there.index("--rdzv-endpoint") + 1] == "203.0.113.1:29500"
    assert there[there.index("--max-restarts") + 1] == "3" and command.restarts


@pytest.mark.parametrize("path", ["with space.yaml", "a;b.yaml", "$HOME.yaml", "a%n.yaml", "it's.yaml"])
def test_pdsh_is_given_nothing_that_a_shell_would_read(tmp_path: Path, path: str) -> None:
    config, cluster = job(tmp_path)
    with pytest.raises(LaunchError, match="reaches a shell through DeepSpeed's launcher, which does not quote it"):
        deepspeed_cluster_command(config, cluster, path)


def test_deepspeed_reads_what_is_written_for_it(tmp_path: Path) -> None:
    config, cluster = job(tmp_path, "cluster.exclude=a:0", "cluster.environment=[TOKEN]")
    base = {"PATH": "/usr/bin", "TOKEN": "t0", "PYTHONPATH": "/x", "NCCL_DEBUG": "INFO", "RANK": "7"}
    command = deepspeed_cluster_command(config, cluster, "a.yaml", base=base)
    argv = command.argv
    assert argv[argv.index("--include") + 1] == "a:1@b:0,1"
    assert (tmp_path / "launch" / "hostfile").read_text() == "a slots=2\nb slots=2\n"
    carried = dict(line.split("=", 1) for line in (tmp_path / "launch" / "environment").read_text().splitlines())
    assert carried["TOKEN"] == "t0" and not {"PYTHONPATH", "NCCL_DEBUG", "RANK", "PATH"} & carried.keys()
    assert not {"PYTHONPATH", "NCCL_DEBUG", "RANK"} & command.environment.keys()


@pytest.mark.parametrize(
    ("launcher", "more", "overrides", "told"),
    [
        (
            "mpirun",
            {},
            ["cluster.exclude=a:0"],
            "--launcher mpirun starts workers by number, and a is to use devices [1]",
        ),
        ("deepspeed", {"runner": "openmpi"}, ["cluster.exclude=a:0"], "--runner openmpi starts workers by number"),
        ("deepspeed", {"runner": "mpich"}, ["cluster.exclude=a:1"], "starts as many workers on each host, not"),
        ("torchrun", {}, ["cluster.environment=[NOT_SET_HERE]"], "names NOT_SET_HERE, not set here"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(
    tmp_path: Path, launcher: str, more: dict[str, Any], overrides: Sequence[str], told: str
) -> None:
    config, cluster = job(tmp_path, *overrides)
    with pytest.raises(LaunchError) as error:
        MAKERS[launcher](config, cluster, "a.yaml", **more, base={"PATH": "/usr/bin"})
    assert told in str(error.value)


@pytest.mark.parametrize(("cores", "bound"), [((4, 4), True), ((4, 3), False), ((4, None), False)])
def test_mpirun_binds_workers_where_every_host_is_known_to_have_cores_enough(
    tmp_path: Path, cores: tuple[int | None, ...], bound: bool
) -> None:
    config, cluster = job(tmp_path, "run.threads=2")
    hosts = tuple(replace(host, cores=count) for host, count in zip(cluster.hosts, cores, strict=True))
    argv = mpirun_cluster_command(config, replace(cluster, hosts=hosts), "a.yaml").argv
    placed = [argv[argv.index(name) + 1] for name in ("--map-by", "--bind-to")]
    assert placed == (["slot:PE=2", "core"] if bound else ["slot:OVERSUBSCRIBE", "none"])


def test_workers_are_the_slots_of_the_cluster(tmp_path: Path) -> None:
    config, cluster = job(tmp_path)
    assert Job(config, CONFIG, (), "torchrun", cluster).workers == 4
    with pytest.raises(LaunchError, match="--workers 3 contradicts the 4 slots"):
        Job(config, CONFIG, (), "torchrun", cluster, 3).command({})
    with pytest.raises(LaunchError, match="--max-restarts 1 is torchrun's"):
        Job(config, CONFIG, (), "deepspeed", cluster, restarts=1).command({})
    with pytest.raises(LaunchError, match="--min-hosts 1 is torchrun's, over several hosts"):
        Job(config, CONFIG, (), "torchrun", None, min_nodes=1).command({})


def test_torchrun_of_one_host_starts_workers_again_in_a_store_of_their_own(tmp_path: Path) -> None:
    config, _ = job(tmp_path)
    command = Job(config, CONFIG, (), "torchrun", None, restarts=3).command({"PATH": "/usr/bin"})
    assert command.argv[command.argv.index("--max-restarts") + 1] == "3" and command.restarts
    assert "--rdzv-endpoint" in command.argv and "--master-addr" not in command.argv
    assert command.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_the_subnet_holds_every_address() -> None:
    assert subnet(["10.77.0.1", "10.77.0.2"]) == "10.77.0.0/30"
    assert subnet(["10.77.0.1", "10.77.0.2", "10.77.1.9"]) == "10.77.0.0/23"
    assert subnet(["10.77.0.5"]) == "10.77.0.5/32"
