"""The commands for several hosts: what they quote, what they forward, and what they refuse."""

import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import Config, load_config
from dist_moe.errors import ConfigError
from dist_moe.launch.cluster import Cluster, read_cluster
from dist_moe.launch.command import Command, LaunchError
from dist_moe.launch.job import Job
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher, load_launcher
from dist_moe.launch.launchers.mpirun import openmpi_network, subnet

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"
HOSTS = "cluster.hosts=[{name: a, slots: 2, address: 203.0.113.1}, {name: b, slots: 2, address: 203.0.113.2}]"
NASTY = "x\"; touch /tmp/struck; $(touch /tmp/struck) `touch /tmp/struck` ' %n"


def job(tmp_path: Path, *overrides: str) -> tuple[Config, Cluster]:
    config = load_config(CONFIG, [HOSTS, f"run.dir={tmp_path}", *overrides])
    cluster = read_cluster(config.cluster)
    assert cluster
    return config, cluster


def command_of(
    launcher: str,
    config: Config,
    cluster: Cluster,
    path: str = "a.yaml",
    overrides: Sequence[str] = (),
    base: dict[str, str] | None = None,
    **options: Any,
) -> Command:
    loaded = load_launcher(launcher)
    assert isinstance(loaded, ProcessLauncher)
    request = LaunchRequest(config, path, overrides, cluster, **options)
    return loaded.command(request, dict(os.environ) if base is None else base)


def remote_words(command: Command) -> list[str]:
    """The words that the shell of the second host reads, without running them."""
    return shlex.split(command.remote_commands[0][-1])


def test_read_cluster_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    _, cluster = job(tmp_path, "cluster.exclude=b:0")
    assert [(host.name, host.devices, host.address) for host in cluster.hosts] == [
        ("a", (0, 1), "203.0.113.1"),
        ("b", (1,), "203.0.113.2"),
    ]
    assert cluster.workers == 3
    assert read_cluster(load_config(CONFIG).cluster) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.hostfile=hosts"], "are both set; set one of the two"),
        (["cluster.hosts=[{name: a}, {name: a}]"], "lists a name twice"),
        (["cluster.hosts=[{name: no-such-host.invalid}]"], "does not resolve"),
        (
            ["cluster.hosts=[{name: localhost}, {name: b, address: 203.0.113.2}]"],
            "set cluster.hosts[0].address to the first host's own address",
        ),
    ],
)
def test_read_cluster_refuses_invalid_hosts(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_cluster(load_config(CONFIG, [HOSTS, *overrides]).cluster)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["-oProxyCommand=reboot", "a b", "$(reboot)", ""])
def test_configuration_refuses_invalid_names(name: str) -> None:
    for key in ("ssh_user", "interface"):
        with pytest.raises(ConfigError, match=rf"cluster\.{key}="):
            load_config(CONFIG, [f"cluster.{key}={name!r}"])


def test_torchrun_quotes_what_another_hosts_shell_reads(tmp_path: Path) -> None:
    config, cluster = job(
        tmp_path, "cluster.environment=[SECRET]", f"cluster.folder={json.dumps(NASTY)}", "cluster.ssh_port=2222"
    )
    command = command_of("torchrun", config, cluster, NASTY, [f"run.dir={NASTY}"], base={"SECRET": NASTY, "OTHER": "1"})
    (ssh,) = command.remote_commands
    assert ssh[0] == "ssh" and ssh[-2] == "b" and ssh[-4:-2] == ("-p", "2222")
    found = remote_words(command)
    assert found[:4] == ["cd", NASTY, "&&", "exec"]
    assert found[-2:] == [NASTY, f"run.dir={NASTY}"]
    assert not any("SECRET=" in word for word in found), "an argument list can be read by everybody on the host"
    for argv, sent in command.processes():
        assert sent is not None and sent["SECRET"] == NASTY and "OTHER" not in sent, argv


def test_torchrun_gives_each_host_its_devices_and_address(tmp_path: Path) -> None:
    config, cluster = job(tmp_path, "cluster.include=a@b:1")
    command = command_of("torchrun", config, cluster, max_restarts=3, min_hosts=1)
    words = remote_words(command)
    assert command.sent_variables[1] is not None and command.sent_variables[1]["CUDA_VISIBLE_DEVICES"] == "1"
    for name, value in (("--nnodes", "1:2"), ("--nproc-per-node", "1"), ("--local-addr", "203.0.113.2")):
        assert words[words.index(name) + 1] == value
    assert words[words.index("--rdzv-endpoint") + 1] == "203.0.113.1:29500"
    assert words[words.index("--max-restarts") + 1] == "3" and command.restarts and command.replaces_workers
    assert "dist_moe.comm.rendezvous" in words and words[words.index("--rdzv-backend") + 1] == "dist-moe"
    secret = command.sent_variables[1]["DIST_MOE_RENDEZVOUS_SECRET"]
    assert len(bytes.fromhex(secret)) == 32
    assert not any(secret in word for argv, _ in command.processes() for word in argv)


@pytest.mark.parametrize("path", ["with space.yaml", "a;b.yaml", "$HOME.yaml", "a%n.yaml", "it's.yaml"])
def test_pdsh_is_given_nothing_that_a_shell_would_change(tmp_path: Path, path: str) -> None:
    config, cluster = job(tmp_path)
    with pytest.raises(LaunchError, match="reaches a shell through DeepSpeed's launcher, which does not quote it"):
        command_of("deepspeed", config, cluster, path)


def test_deepspeed_hostfile_and_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of this host"))
    config, cluster = job(tmp_path, "cluster.exclude=a:0", "cluster.environment=[TOKEN]")
    base = {"PATH": "/usr/bin", "TOKEN": "t0", "PYTHONPATH": "/x", "NCCL_DEBUG": "INFO", "RANK": "7"}
    command = command_of("deepspeed", config, cluster, base=base)
    argv = command.argv
    assert argv[argv.index("--include") + 1] == "a:1@b:0,1"
    assert not (tmp_path / "launch").exists(), "nothing is written before the job runs"
    with command.written():
        assert (tmp_path / "launch" / "hostfile").read_text() == "a slots=2\nb slots=2\n"
        forwarded = dict(line.split("=", 1) for line in (tmp_path / "launch" / "environment").read_text().splitlines())
    assert not {"TOKEN", "PYTHONPATH", "NCCL_DEBUG", "RANK", "PATH"} & forwarded.keys()
    assert forwarded["DIST_MOE_LAUNCH"].startswith("file:") and command.held_variables == {"TOKEN": "t0"}
    assert list(command.holders) == ["a", "b"]
    assert not any("t0" in word for holder in command.holders.values() for word in holder)
    # The folder of TMPDIR need not exist on other hosts.
    assert Path(forwarded["DIST_MOE_LAUNCH"].removeprefix("file:")).parts[:2] == ("/", "tmp")
    assert not {"PYTHONPATH", "NCCL_DEBUG", "RANK"} & command.environment.keys()


@pytest.mark.parametrize(
    ("launcher", "options", "overrides", "message"),
    [
        (
            "mpirun",
            {},
            ["cluster.exclude=a:0"],
            "--launcher mpirun starts workers by number, and a is to use devices [1]",
        ),
        ("deepspeed", {"runner": "openmpi"}, ["cluster.exclude=a:0"], "--runner openmpi starts workers by number"),
        (
            "deepspeed",
            {"runner": "mpich"},
            ["cluster.exclude=a:1"],
            "starts the same number of workers on each host, not",
        ),
        ("torchrun", {}, ["cluster.environment=[NOT_SET_HERE]"], "names NOT_SET_HERE, which is not set"),
    ],
)
def test_launchers_refuse_what_they_cannot_start(
    tmp_path: Path, launcher: str, options: dict[str, Any], overrides: Sequence[str], message: str
) -> None:
    config, cluster = job(tmp_path, *overrides)
    with pytest.raises(LaunchError) as error:
        command_of(launcher, config, cluster, base={"PATH": "/usr/bin"}, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(("cores", "bound"), [((4, 4), True), ((4, 3), False), ((4, None), False)])
def test_mpirun_binds_workers_if_every_host_is_known_to_have_enough_cores(
    tmp_path: Path, cores: tuple[int | None, ...], bound: bool
) -> None:
    config, cluster = job(tmp_path, "run.threads=2")
    hosts = tuple(replace(host, cores=count) for host, count in zip(cluster.hosts, cores, strict=True))
    argv = command_of("mpirun", config, replace(cluster, hosts=hosts)).argv
    placed = [argv[argv.index(name) + 1] for name in ("--map-by", "--bind-to")]
    assert placed == (["slot:PE=2", "core"] if bound else ["slot:OVERSUBSCRIBE", "none"])


def test_job_workers_are_the_slots_of_the_cluster(tmp_path: Path) -> None:
    config, cluster = job(tmp_path)
    assert Job("torchrun", LaunchRequest(config, CONFIG, (), cluster)).workers == 4


@pytest.mark.parametrize(
    ("launcher", "on_cluster", "options", "message"),
    [
        ("torchrun", True, {"asked_workers": 3}, "--workers 3 contradicts the 4 slots of the cluster; remove it"),
        (
            "deepspeed",
            True,
            {"max_restarts": 1},
            "--max-restarts 1 is ignored by --launcher deepspeed; remove it, or use --launcher torchrun",
        ),
        ("torchrun", False, {"min_hosts": 1}, "--min-hosts 1 is ignored without a cluster; remove it"),
        ("torchrun", True, {"min_hosts": 3}, "--min-hosts 3 is more than the 2 hosts of the cluster"),
        ("torchrun", True, {"runner": "pdsh"}, "--runner pdsh is ignored by --launcher torchrun"),
        ("deepspeed", False, {"runner": "openmpi"}, "--runner openmpi is ignored without a cluster"),
        ("deepspeed", True, {"runner": "rsh"}, "unknown --runner rsh; use pdsh, openmpi, mpich, slurm"),
        (
            "slurm",
            False,
            {"asked_workers": 4},
            "--workers 4 is ignored by --launcher slurm; remove it, and set slurm.nodes and slurm.tasks_per_node",
        ),
    ],
)
def test_job_refuses_options_that_would_be_ignored(
    tmp_path: Path, launcher: str, on_cluster: bool, options: dict[str, Any], message: str
) -> None:
    config, cluster = job(tmp_path)
    with pytest.raises(LaunchError) as error:
        Job(launcher, LaunchRequest(config, CONFIG, (), cluster if on_cluster else None, **options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("launcher", "on_cluster", "runner", "refused"),
    [
        ("deepspeed", False, None, True),
        ("deepspeed", True, "pdsh", True),
        ("deepspeed", True, "openmpi", False),
        ("torchrun", True, None, True),
        ("kubernetes", False, None, True),
        ("mpirun", False, None, False),
        ("slurm", False, None, False),
    ],
)
def test_the_mpi_backend_needs_a_launcher_of_mpi(
    tmp_path: Path, launcher: str, on_cluster: bool, runner: str | None, refused: bool
) -> None:
    config, cluster = job(tmp_path)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"backend": "mpi"})})
    request = LaunchRequest(config, CONFIG, (), cluster if on_cluster else None, runner=runner)
    found = ""
    try:
        Job(launcher, request)
    except LaunchError as error:
        found = str(error)
    assert found.startswith("parallel.backend=mpi needs a launcher of MPI") == refused, found
    assert found.endswith("use --launcher mpirun, or parallel.backend=gloo" if refused else ""), found


def test_torchrun_of_one_host_restarts_workers_with_a_store_of_their_own(tmp_path: Path) -> None:
    config, _ = job(tmp_path)
    command = Job("torchrun", LaunchRequest(config, CONFIG, max_restarts=3)).command({"PATH": "/usr/bin"})
    assert command.argv[command.argv.index("--max-restarts") + 1] == "3" and command.restarts
    assert "store_type=file" in command.argv and "--master-addr" not in command.argv and command.replaces_workers
    assert command.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_hosts_of_a_pbs_job_are_used_where_the_configuration_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("127.0.0.2\n203.0.113.9\n203.0.113.9\n127.0.0.2\n")
    inside = {"PBS_JOBID": "7", "PBS_NODEFILE": str(nodes)}
    settings = load_config(CONFIG, []).cluster
    assert read_cluster(settings) is None
    with pytest.raises(LaunchError, match=r"127\.0\.0\.2 resolves to the loopback address"):
        read_cluster(settings, inside)
    assert "the hosts are those of PBS_NODEFILE: 127.0.0.2 slots=2, 203.0.113.9 slots=2" in caplog.text
    named = load_config(CONFIG, [HOSTS]).cluster
    assert [host.name for host in (read_cluster(named, inside) or job(tmp_path)[1]).hosts] == ["a", "b"]
    nodes.write_text("127.0.0.2\n127.0.0.2\n")
    assert read_cluster(settings, inside) is None, "one host: --workers counts"


IPV6_HOSTS = "cluster.hosts=[{name: 'fd00::a', slots: 2}, {name: '[fd00::b]', slots: 2}]"


def test_hosts_with_ipv6_addresses_meet_by_torchrun(tmp_path: Path) -> None:
    config, cluster = job(tmp_path, IPV6_HOSTS)
    assert [(host.name, host.address) for host in cluster.hosts] == [("fd00::a", "fd00::a"), ("fd00::b", "fd00::b")]
    command = command_of("torchrun", config, cluster)
    for argv in (command.argv, *command.remote_commands):
        assert "--rdzv-endpoint [fd00::a]:29500" in " ".join(argv).replace("'", "").replace("\\", "")


@pytest.mark.parametrize(
    "options", [{"launcher": "mpirun"}, {"launcher": "deepspeed"}, {"launcher": "deepspeed", "runner": "openmpi"}]
)
def test_launchers_that_take_no_ipv6_address_say_so(tmp_path: Path, options: dict[str, Any]) -> None:
    config, cluster = job(tmp_path, IPV6_HOSTS)
    with pytest.raises(LaunchError, match="takes no IPv6 address, and a host is fd00::a; give it a name"):
        command_of(config=config, cluster=cluster, **options)


def test_an_ipv6_address_of_one_link_is_refused_with_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="fe80::1%eth0 is an address of one link"):
        job(tmp_path, "cluster.hosts=[{name: 'fe80::1%eth0'}]")
    _, cluster = job(tmp_path, "cluster.hosts=[{name: 'fe80::1%eth0', address: 'fd00::a'}]")
    assert (cluster.hosts[0].name, cluster.hosts[0].address) == ("fe80::1%eth0", "fd00::a")
    with pytest.raises(ConfigError, match="is not a valid name of a host"):
        job(tmp_path, "cluster.hosts=[{name: 'fe80::1%$(reboot)'}]")


def test_openmpi_needs_the_interface_of_ipv6_addresses(tmp_path: Path) -> None:
    hosts = "cluster.hosts=[{name: a, address: 'fd00::a'}, {name: b, address: 'fd00::b'}]"
    _, cluster = job(tmp_path, hosts)
    with pytest.raises(LaunchError, match="needs the interface of the IPv6 addresses fd00::a, fd00::b"):
        openmpi_network(cluster)
    _, cluster = job(tmp_path, hosts, "cluster.interface=eth7")
    assert openmpi_network(cluster)[2] == "eth7"


def test_subnet_contains_every_address() -> None:
    assert subnet(["10.77.0.1", "10.77.0.2"]) == "10.77.0.0/30"
    assert subnet(["10.77.0.1", "10.77.0.2", "10.77.1.9"]) == "10.77.0.0/23"
    assert subnet(["10.77.0.5"]) == "10.77.0.5/32"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_dry_run_writes_nothing_and_shows_no_value(tmp_path: Path, launcher: str) -> None:
    """A running job of the same configuration may have files there."""
    config, cluster = job(tmp_path, "cluster.environment=[TOKEN]")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "hostfile").write_text("of a running job\n")
    request = LaunchRequest(config, CONFIG, (), cluster)
    lines = Job(launcher, request).dry_run({"PATH": "/usr/bin", "TOKEN": "t0-secret"})
    assert "t0-secret" not in "".join(lines)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {Path("launch/hostfile"): "of a running job\n"}
