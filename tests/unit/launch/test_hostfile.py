"""Hostfiles of DeepSpeed, OpenMPI and MPICH, the selection of hosts, and the message for every mistake."""

from pathlib import Path

import pytest

from dist_moe.launch.command import LaunchError
from dist_moe.launch.hostfile import allocated_hosts, filter_hosts, read_hostfile

POOL = {"a": [0, 1], "b": [0, 1, 2], "c": [0]}


def written(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_read_hostfile_of_deepspeed_openmpi_and_mpich(tmp_path: Path) -> None:
    text = "# ours\nb slots=3  # big\n\na slots = 2 max_slots=4\nc:1\n10.0.0.7\n"
    assert read_hostfile(written(tmp_path, text)) == {"b": [0, 1, 2], "a": [0, 1], "c": [0], "10.0.0.7": [0]}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        pytest.param("\ufeffa slots=2\r\nb slots=1\r\n", {"a": 2, "b": 1}, id="BOM and CRLF"),
        pytest.param("a\n\nb\na\nb\nb # last\n", {"a": 2, "b": 3}, id="a line for each slot, as of PBS and LSF"),
        pytest.param("a 2\nb 3\n", {"a": 2, "b": 3}, id="name and number"),
        pytest.param("a max_slots=4\nb slots=2 max-slots=2\n", {"a": 1, "b": 2}, id="OpenMPI's largest number"),
        pytest.param(
            "fd00::1\nfd00::1:2 slots=2\n[fd00::3]:4\n[fd00::4] slots=3\n::ffff:10.0.0.1 2\n",
            {"fd00::1": 1, "fd00::1:2": 2, "fd00::3": 4, "fd00::4": 3, "::ffff:10.0.0.1": 2},
            id="IPv6",
        ),
        pytest.param("fe80::1%eth0 slots=2\n[fe80::2%eth0]:3\n", {"fe80::1%eth0": 2, "fe80::2%eth0": 3}, id="scoped"),
        pytest.param("gpu_0.example.org:8\n10.0.0.7:2\n", {"gpu_0.example.org": 8, "10.0.0.7": 2}, id="MPICH"),
    ],
)
def test_read_hostfile_of_every_notation(tmp_path: Path, text: str, hosts: dict[str, int]) -> None:
    (tmp_path / "hosts").write_bytes(text.encode())
    found = read_hostfile(str(tmp_path / "hosts"))
    assert found == {name: list(range(slots)) for name, slots in hosts.items()}
    assert list(found) == list(hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "bob@host0 slots=2\n",
            "line 1: 'bob@host0 slots=2' names the user bob, and a hostfile lists hosts alone; write `host0 slots=2`, "
            "and set cluster.ssh_user=bob",
        ),
        ("bob@[fd00::1]:2\n", "write `[fd00::1]:2`, and set cluster.ssh_user=bob"),
        ("a\na slots=2\n", "line 2: a is listed twice"),
        ("a:2\nb\na\n", "line 3: a is listed twice"),
        ("[a]:2\n", "line 1: '[a]:2' is not a line of a hostfile"),
        ("[fd00::1\n", "is not a line of a hostfile"),
        ("a:b:c\n", "is not a line of a hostfile"),
        ("a:2:3\n", "is not a line of a hostfile"),
        ("fe80::1%$(reboot)\n", "is not a line of a hostfile"),
        ("a slots=\u00b2\n", "slots; set 1 to 4096"),
        ("a slots=2\na slots=1\n", "line 2: a is listed twice; give each host one line"),
        ("a slots=none\n", "line 1: 'a slots=none' has none slots; set 1 to 4096"),
        ("a slots=0\n", "has 0 slots; set 1 to 4096"),
        ("a b c\n", "line 1: 'a b c' is not a line of a hostfile; write for example"),
        ("-oProxyCommand=reboot slots=2\n", "is not a line of a hostfile"),
        ("$(reboot) slots=2\n", "is not a line of a hostfile"),
        ("\n# nothing\n", "lists no host; write lines like"),
    ],
)
def test_read_hostfile_reports_a_mistake_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_hostfile(written(tmp_path, text))
    assert message in str(error.value)


def test_read_hostfile_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        LaunchError, match=r"^cluster\.hostfile=.*gone cannot be read \(No such file or directory\); give"
    ):
        read_hostfile(str(tmp_path / "gone"))


def test_hosts_of_a_job_of_pbs_and_lsf(tmp_path: Path) -> None:
    nodes = written(tmp_path, "n1\nn2\nn1\nn2\n")
    both = {"n1": [0, 1], "n2": [0, 1]}
    assert allocated_hosts({"PBS_JOBID": "7.server", "PBS_NODEFILE": nodes}) == ("PBS_NODEFILE", both)
    assert allocated_hosts({"LSB_JOBID": "7", "LSB_DJOB_HOSTFILE": nodes}) == ("LSB_DJOB_HOSTFILE", both)
    assert allocated_hosts({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 2 n2 2 "}) == ("LSB_MCPU_HOSTS", both)
    assert allocated_hosts({"PBS_NODEFILE": nodes}) == ("", {}), "not in a job"
    with pytest.raises(LaunchError, match=r"PBS_NODEFILE=.*gone cannot be read"):
        allocated_hosts({"PBS_JOBID": "7", "PBS_NODEFILE": str(tmp_path / "gone")})
    with pytest.raises(LaunchError, match="LSB_MCPU_HOSTS=n1 2 -x: '-x' is not a line"):
        allocated_hosts({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 2 -x"})


def test_include_names_an_ipv6_host_with_and_without_devices() -> None:
    hosts = {"fd00::1": [0, 1], "fd00::2": [0, 1]}
    assert filter_hosts(hosts, "fd00::1", None) == {"fd00::1": [0, 1]}
    assert filter_hosts(hosts, "fd00::1:1@[fd00::2]:0", None) == {"fd00::1": [1], "fd00::2": [0]}
    with pytest.raises(LaunchError, match="names 'fd00::3', which is not a host of the cluster"):
        filter_hosts(hosts, "fd00::3:1", None)


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, POOL),
        ("b@a", None, {"a": [0, 1], "b": [0, 1, 2]}),
        ("b:2,0", None, {"b": [0, 2]}),
        ("b:2@b:0@c", None, {"b": [0, 2], "c": [0]}),
        (None, "b", {"a": [0, 1], "c": [0]}),
        (None, "b:1@c:0", {"a": [0, 1], "b": [0, 2]}),
    ],
)
def test_include_and_exclude_keep_the_order_of_the_hosts(
    include: str | None, exclude: str | None, left: dict[str, list[int]]
) -> None:
    found = filter_hosts(POOL, include, exclude)
    assert (found, list(found)) == (left, list(left))


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "contradict; set one of the two"),
        ("d", None, "names 'd', which is not a host of the cluster; use a, b, c"),
        ("a:2", None, "names device '2' of a, which has 0 to 1; use those"),
        (None, "a:x", "names device 'x' of a"),
        (None, "a@b@c", "leaves no worker; select more"),
    ],
)
def test_filter_hosts_refuses_an_impossible_selection(include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(LaunchError) as error:
        filter_hosts(POOL, include, exclude)
    assert message in str(error.value)
