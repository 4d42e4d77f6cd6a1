"""The doctor over two hosts, with and without shared storage."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import DIST_MOE, LIMIT_S, write_config
from tests.cluster.hosts import Host
from tests.selection import only_first


@pytest.mark.parametrize("shared", only_first([True, False]))
def test_the_doctor_checks_the_hosts_of_the_cluster(three: list[Host], tmp_path: Path, shared: bool) -> None:
    """Every check passes on two hosts; what one host saves, the other loads."""
    write_config(tmp_path, three, (1, 1), 4)
    apart, run, found = tmp_path / "apart", tmp_path / "run", tmp_path / "found.json"
    apart.mkdir()
    run.mkdir()
    mount, unmount = ["mount", "--bind", str(apart), str(run)], ["umount", str(run)]
    if not shared:
        subprocess.run(three[1].argv(mount, Path("/")), check=True)
    try:
        arguments = ["--launcher", "torchrun", "--json", str(found), f"cluster.shared_storage={str(shared).lower()}"]
        ended = three[0].run([str(DIST_MOE), "doctor", "run.yaml", *arguments], tmp_path, LIMIT_S)
    finally:
        if not shared:
            subprocess.run(three[1].argv(unmount, Path("/")), check=True)
    assert ended.code == 0, ended.output + ended.errors
    checks = {finding["check"]: finding for finding in json.loads(found.read_text())}
    assert {finding["outcome"] for finding in checks.values()} <= {"pass", "warn"}, checks
    assert f"1 on {three[0].name}, 1 on {three[1].name}" in checks["placement"]["found"]
    assert ", ".join(host.address for host in three[:2]) in checks["ports"]["found"]
    assert "restored bit for bit" in checks["save and load"]["found"]
    assert not list(run.iterdir()), "the doctor deletes its files"
    assert not list(apart.rglob("*.safetensors")), "also on the other host"
