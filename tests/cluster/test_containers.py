"""The images as users build them: what they contain, and `make docker-train` with two containers."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.cluster.conftest import Images
from tests.cluster.engine import BUILD_LIMIT_S, ROOT, output_of
from tests.cluster.hosts import Ended
from tests.cluster.test_launchers import assert_close_losses, losses
from tests.unit.test_packaging import lock

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)

COMPOSE = "docker-compose -p dist-moe -f docker/compose.yaml"
BUILD_TOOLS = ("cc", "gcc", "g++", "make", "ld", "git")
PAGE = "http://127.0.0.1:6006"
TRAIN_LIMIT_S = 400.0


@pytest.fixture(scope="module")
def composed(images: Images) -> Iterator[Ended]:
    """Run `make docker-train` with the image that is built already."""
    yield make_train(images)
    output_of(images.engine.outside(*COMPOSE.split(), "down", "--volumes", "--timeout", "5"))


def make_train(images: Images, *more: str) -> Ended:
    compose = " ".join([COMPOSE, *more])
    # This docker-compose stops if no container prints anything for this number of seconds.
    patience = {"COMPOSE_HTTP_TIMEOUT": "600"}
    command = ("make", "--assume-old=docker", "docker-train", f"COMPOSE={compose}")
    return images.engine.outside(*command, limit_s=TRAIN_LIMIT_S, **patience)


def inside(images: Images, program: str, *arguments: str, user: str = "10001") -> str:
    """Run a program in a new container; return its output."""
    options = ["--rm", "--network", "none", "--user", user, "--entrypoint", program]
    return images.engine.podman("run", *options, images.cpu, *arguments)


def test_image_has_labels_and_runs_as_an_ordinary_user(images: Images) -> None:
    (described,) = json.loads(images.engine.podman("image", "inspect", images.cpu))
    assert described["User"] == "10001:10001"
    labels = described["Labels"]
    assert labels["org.opencontainers.image.title"] == "dist_moe"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert described["Healthcheck"]["Test"] == ["CMD", "python", "-c", "import dist_moe"]
    assert inside(images, "id", "-u") == "10001"
    assert (
        inside(images, "sh", "-c", "touch /runs/x /cache/x && ! touch /opt/dist-moe/x 2>/dev/null && echo so") == "so"
    )
    help_text = images.engine.podman("run", "--rm", "--network", "none", images.cpu)
    assert "launch" in help_text and "train" in help_text


def test_image_has_no_build_tools_and_no_cache(images: Images) -> None:
    tools = f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool; done"
    files = "find / -xdev -name '*.whl' -o -path '*/bin/pip' -o -path '*-packages/pip'"
    found = inside(images, "sh", "-c", f"{tools}; {files}", user="0").splitlines()
    # The venv module bundles wheels; they are not of pip's cache.
    unexpected = [path for path in found if "/ensurepip/" not in path and "/python-wheels/" not in path]
    assert all(path.startswith(("/opt/dist-moe/bin/", "/opt/dist-moe/lib/")) for path in unexpected), unexpected
    assert not [path for path in unexpected if path.endswith(".whl")]


def test_image_has_the_locked_packages_and_a_bill_of_materials_with_all(images: Images) -> None:
    listed = json.loads(inside(images, "python", "-m", "pip", "list", "--format", "json"))
    installed = {canonicalize_name(each["name"]): each["version"] for each in listed}
    own = {"dist-moe-train", "pip"}
    assert own < installed.keys()
    found = {name: version.partition("+")[0] for name, version in installed.items() if name not in own}
    assert found == lock("image.txt") | lock("torch.txt")
    bill = json.loads(inside(images, "cat", "/opt/dist-moe/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert {canonicalize_name(each["name"]): each["version"] for each in bill["components"]} == installed
    assert all(each["purl"].startswith("pkg:pypi/") for each in bill["components"] if each["name"] not in own)


@pytest.mark.parametrize("file", ["image.txt", "torch.txt"])
def test_a_package_with_another_hash_ends_the_build(images: Images, tmp_path: Path, file: str) -> None:
    context = tmp_path / "context"
    shutil.copytree(ROOT / "docker", context / "docker")
    changed = context / "docker" / "lock" / file
    ours = changed.read_text()
    changed.write_text(re.sub(r"(?<=sha256:).", lambda first: "1" if first[0] == "0" else "0", ours))
    with pytest.raises(AssertionError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        images.build("cpu", context)


def test_image_is_healthy(images: Images) -> None:
    container = images.engine.podman("run", "--detach", "--entrypoint", "sleep", images.cpu, "300")
    assert health(images, container) == "healthy"
    images.engine.podman("rm", "--force", "--time", "0", container)


@pytest.mark.parametrize("target", ["ssh", "cuda"])
def test_the_other_targets_build(images: Images, target: str) -> None:
    (described,) = json.loads(images.engine.podman("image", "inspect", images.build(target)))
    assert described["User"] == "10001:10001"
    if target == "cuda":
        assert "NVIDIA_VISIBLE_DEVICES=all" in described["Config"]["Env"]
        compile_one = "echo 'int main(void) { return 0; }' | gcc -x c - -o /tmp/compiled && /tmp/compiled"
        images.engine.podman("run", "--rm", "--entrypoint", "sh", described["Id"], "-c", compile_one)


def test_two_containers_train_together_to_the_end(images: Images, composed: Ended, alone_in_a_container: Path) -> None:
    assert composed.code == 0, (composed.output + composed.errors)[-6000:]
    assert "exit codes: 0 0" in composed.output
    run_dir = volume(images, "dist-moe_runs") / "debug"
    described = json.loads((run_dir / "run.json").read_text())
    assert described["world"]["workers"] == 2, described["world"]
    found, alone = losses(run_dir), losses(alone_in_a_container)
    assert len(found) == len(alone) == 6
    assert_close_losses(found, alone)


def test_tensorboard_stays_and_shows_the_run(images: Images, composed: Ended) -> None:
    assert composed.code == 0
    tags = json.loads(images.engine.fetch(f"{PAGE}/data/plugin/scalars/tags"))
    assert "1_overview/loss" in tags["debug"], tags
    container = output_of(images.engine.outside(*COMPOSE.split(), "ps", "-q", "tensorboard"))
    assert health(images, container) == "healthy"


def test_a_worker_that_fails_ends_the_command_with_a_failure(images: Images, composed: Ended, tmp_path: Path) -> None:
    assert composed.code == 0
    broken = tmp_path / "broken.yaml"
    broken.write_text("services:\n  worker1:\n    command: [--no-such-option]\n")
    ended = make_train(images, "-f", str(broken))
    assert ended.code != 0
    assert "worker1_1 exited with code 2" in ended.output
    assert ended.seconds < 100
    assert "train/loss" in images.engine.fetch(f"{PAGE}/data/plugin/scalars/tags")


def health(images: Images, container: str) -> str:
    """Run the health check of a container now, and return its result; without systemd nothing runs it regularly."""
    images.engine.podman("healthcheck", "run", container)
    (described,) = json.loads(images.engine.podman("inspect", container))
    return str(described["State"]["Health"]["Status"])


def volume(images: Images, name: str) -> Path:
    """Return the folder of a volume."""
    return Path(images.engine.podman("volume", "inspect", "--format", "{{.Mountpoint}}", name))
