"""Containers as hosts for ssh: `dist-moe launch` in one of them trains on both."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import LIMIT_S, Images
from tests.cluster.engine import BUILD_LIMIT_S

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)

NETWORK = "ssh"
NODES = ("node0", "node1")
UP_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def nodes(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two containers of the ssh target with one key; the folder that both have as /runs."""
    folder = tmp_path_factory.mktemp("nodes")
    keys, runs = folder / "keys", folder / "runs"
    keys.mkdir()
    runs.mkdir()
    runs.chmod(0o777)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "id_ed25519"], check=True)
    (keys / "id_ed25519.pub").rename(keys / "authorized_keys")
    # Like a mounted secret: readable only by the user of the container.
    subprocess.run(["chown", "-R", "10001:10001", keys], check=True)
    image = images.build("ssh")
    images.engine.podman("network", "create", NETWORK)
    volumes = [f"--volume={keys}:/keys:ro", f"--volume={runs}:/runs"]
    for name in NODES:
        named = ["--name", name, "--hostname", name, "--network", NETWORK]
        images.engine.podman("run", "--detach", *named, *volumes, image)
    yield runs
    images.engine.podman("network", "rm", "--force", "--time", "1", NETWORK)


def test_a_launch_in_one_container_trains_on_two(images: Images, nodes: Path) -> None:
    deadline = time.monotonic() + UP_LIMIT_S
    for name in NODES:
        while images.engine.run("podman", "healthcheck", "run", name).code != 0:
            assert time.monotonic() < deadline, images.engine.run("podman", "logs", name)
            time.sleep(0.5)
    hosts = ", ".join(f"{{name: {name}, slots: 1}}" for name in NODES)
    overrides = [f"cluster.hosts=[{hosts}]", "run.dir=/runs/debug", "run.threads=1", "train.steps=4"]
    launch = ["dist-moe", "launch", "/opt/configs/debug.yaml", "--launcher", "torchrun", *overrides]
    ended = images.engine.run("podman", "exec", NODES[0], *launch, limit_s=LIMIT_S)
    assert ended.code == 0, (ended.output + ended.errors)[-6000:]
    assert json.loads((nodes / "debug" / "run.json").read_text())["world"]["workers"] == 2
    assert "[0@node0] deepseek_v3" in ended.output
    assert "validation loss" in ended.output
