"""Hostfiles of DeepSpeed, OpenMPI and MPICH, the selection of hosts, and the message for every mistake."""

from pathlib import Path

import pytest

from dist_moe.launch.command import LaunchError
from dist_moe.launch.hostfile import filter_hosts, read_hostfile

POOL = {"a": [0, 1], "b": [0, 1, 2], "c": [0]}


def written(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_read_hostfile_of_deepspeed_openmpi_and_mpich(tmp_path: Path) -> None:
    text = "# ours\nb slots=3  # big\n\na slots = 2 max_slots=4\nc:1\n10.0.0.7\n"
    assert read_hostfile(written(tmp_path, text)) == {"b": [0, 1, 2], "a": [0, 1], "c": [0], "10.0.0.7": [0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\na slots=1\n", "line 2: a is listed twice; give each host one line"),
        ("a slots=none\n", "line 1: 'a slots=none' has none slots; set 1 or more"),
        ("a slots=0\n", "has 0 slots; set 1 or more"),
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
    with pytest.raises(LaunchError, match=r"cluster\.hostfile=.*gone cannot be read"):
        read_hostfile(str(tmp_path / "gone"))


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
