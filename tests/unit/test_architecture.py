"""The house rules that a program can hold: import order, small rooms, names, no hidden state, mutants."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mutants.catalogue import read_catalogue
from tests.unit.source import ROOT, Source, depth, sources

Rule = Callable[[Source], Iterator[str]]

OURS = sources("dist_moe")
EVERYTHING = [*OURS, *sources("tests"), *sources("benchmarks")]

GROUND = {
    *("deadline", "errors", "files", "interpreter", "package_index", "scores", "section", "status", "text"),
    "untrusted",
}
# Policies and families are below the configuration, because its fields and checks are made from them.
TO_CONFIG = GROUND | {"policies", "families", "config"}
TO_COMM = TO_CONFIG | {"worker", "comm"}
TO_MODEL = TO_COMM | {"data", "balancing", "moe", "probe", "model", "observe"}
TO_ENGINE = TO_MODEL | {"engine"}
TO_TRAIN = TO_ENGINE | {"checkpoint", "health", "train"}
MAY_IMPORT = {
    "text": set[str](),
    "untrusted": set[str](),
    "errors": {"text"},
    "files": {"errors", "text"},
    "section": {"errors", "text", "untrusted"},
    "scores": set(),
    "deadline": set(),
    "interpreter": set(),
    "package_index": {"deadline"},
    "status": set(),
    "policies": GROUND,
    "families": GROUND,
    "config": GROUND | {"policies", "families"},
    "worker": TO_CONFIG,
    "comm": TO_CONFIG | {"worker"},
    "data": TO_COMM,
    "balancing": TO_COMM,
    "moe": TO_COMM,
    "probe": TO_COMM | {"moe"},
    "model": TO_COMM | {"data", "balancing", "moe", "probe"},
    "observe": TO_COMM | {"data", "balancing", "moe"},
    "engine": TO_MODEL,
    "health": TO_ENGINE,
    "checkpoint": TO_ENGINE,
    "train": TO_ENGINE | {"checkpoint", "health"},
    "doctor": TO_TRAIN,
    "study": TO_TRAIN,
    "launch": TO_CONFIG | {"worker"},
    "attach": TO_MODEL,
    "replace": TO_ENGINE | {"checkpoint", "health", "attach"},
    "api": set(),
    "cli": TO_TRAIN | {"doctor", "study", "launch"},
    "__init__": {"api", "attach", "errors", "replace"},
    "__main__": {"cli"},
}
"""Imports go one way: each part, and the others that it may import."""
ONLY_IMPORTER = {
    "deepspeed": "dist_moe/engine/deepspeed.py dist_moe/engine/zero_optimizer.py",
    "tensorboard": "dist_moe/observe/tensorboard.py",
    "torch.utils.tensorboard": "dist_moe/observe/tensorboard.py",
    "pyarrow": "dist_moe/observe/routing/trace.py dist_moe/data/labeled/arrow.py",
    "mpi4py": "dist_moe/comm/mpi/backend.py dist_moe/comm/mpi/reduce_ops.py",
    # It unpickles the state of a rendezvous; comm/rendezvous.py first checks that its writer has the launch's secret.
    "torch.distributed.elastic": "dist_moe/comm/rendezvous.py",
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "marshal", "multiprocessing", "shelve"), ""),
    **dict.fromkeys(("torch.multiprocessing", "torch.distributed.rpc", "torch.package"), ""),
}
UNPICKLING = re.compile(r"\w+_object(_list)?|_(un)?pickler|_tensor_to_object|allow_pickle|find_class")
"""Names of what unpickles in torch.distributed (`all_gather_object`, `broadcast_object_list`) and NumPy."""
MPI_PICKLING = {
    *("allgather", "allreduce", "alltoall", "bcast", "exscan", "gather", "reduce", "scan", "scatter"),
    *("irecv", "mrecv", "recv", "sendrecv"),
}
"""Methods of an MPI communicator that unpickle; those that exchange memory begin with a capital letter."""
UNPICKLES = "unpickles what others send; use dist_moe.comm.objects.all_gather_objects"
CALLS_THAT_UNPICKLE = {
    "dist.all_gather_object(a, b)": "all_gather_object",
    "dist.broadcast_object_list(a)": "broadcast_object_list",
    "MPI.COMM_WORLD.allgather(a)": "allgather",
    "self._comm.recv()": "recv",
    "torch.load(a)": "load",
    "np.load(a, allow_pickle=True)": "allow_pickle",
}
LONGEST_FILE, LONGEST_FUNCTION, DEEPEST, MOST_MODULES = 400, 60, 3, 12
SAY_NOTHING = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}


def starts_with(name: str, package: str) -> bool:
    """Whether a full name is the package or inside it."""
    return name == package or name.startswith(package + ".")


def layers_of(source: Source) -> set[str]:
    """The parts of the design that a file imports."""
    parts = {name.split(".")[1] for name in source.imports() if name.startswith("dist_moe.")}
    return {part for part in parts if (ROOT / "dist_moe" / part).is_dir() or part in MAY_IMPORT}


def stems(source: Source) -> set[str]:
    """The words in the names of a file, its folders and its classes."""
    classes = [node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    names = [*source.path.with_suffix("").parts, *classes]
    return {word.lower() for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def upward_imports(source: Source) -> Iterator[str]:
    """Parts that the file must not import."""
    if source.layer not in MAY_IMPORT:
        yield f"{source.layer} has no place in the order of imports yet; give it one"
    elif upwards := layers_of(source) - MAY_IMPORT[source.layer] - {source.layer}:
        yield f"must not import {sorted(upwards)}"


def large_rooms(source: Source) -> Iterator[str]:
    """Too many lines in the file or in a function, and functions that nest too deep."""
    lines = source.text.count("\n")
    if lines > LONGEST_FILE:
        yield f"{lines} lines; split the file in two nouns"
    for function in source.functions():
        long = (function.end_lineno or function.lineno) - function.lineno + 1
        if long > LONGEST_FUNCTION:
            yield f"{function.name} has {long} lines"
        if source.path.parts[0] != "tests" and depth(function) > DEEPEST:
            yield f"{function.name} nests {depth(function)} deep"


def unnamed(source: Source) -> Iterator[str]:
    """A file that does not open with a sentence, or whose names say nothing."""
    docstring = ast.get_docstring(source.tree)
    if not docstring:
        yield "must open with one sentence that says what it holds"
    elif not docstring.split("\n\n")[0].endswith("."):
        yield "the first paragraph must be a sentence"
    if words := stems(source) & SAY_NOTHING:
        yield f"{sorted(words)} says nothing; use a noun of the design"


def hidden_state(source: Source) -> Iterator[str]:
    """Statements that make a name global."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"global {node.names}; return what a stage makes"


def unpickling(source: Source) -> Iterator[str]:
    """Calls that unpickle what others send: collectives of objects, MPI's methods in lower case, torch.load."""
    for node in ast.walk(source.tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.keyword) else None
        if name is None or name == "construct_object":  # of PyYAML
            continue
        owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        of_mpi = name in MPI_PICKLING and (owner.endswith("_comm") or "COMM" in owner or owner in ("comm", "world"))
        if of_mpi or UNPICKLING.fullmatch(name) or (owner, name) == ("torch", "load"):
            yield f"{name} {UNPICKLES}"


def violations(files: list[Source], rule: Rule) -> list[str]:
    """All that a rule finds in the files, one line each."""
    return [f"{source.path}: {found}" for source in files for found in rule(source)]


def trap_tests() -> dict[str, list[str]]:
    """The tests that hold a trap, by trap: {"T05": ["tests/unit/x.py::test_trap_T05_..."]}."""
    found: dict[str, list[str]] = {}
    for source in sources("tests"):
        for function in source.functions():
            if function.name.startswith("test_trap_"):
                trap = function.name.removeprefix("test_trap_").partition("_")[0]
                found.setdefault(trap, []).append(f"{source.path}::{function.name}")
    return found


def test_the_tree_under_test_is_this_one() -> None:
    for name, file in (("dist_moe", "dist_moe/__init__.py"), ("dist_moe.launch", "dist_moe/launch/__init__.py")):
        found = importlib.import_module(name).__file__
        assert found and Path(found).resolve() == ROOT / file


def test_imports_go_one_way() -> None:
    assert violations(OURS, upward_imports) == []


@pytest.mark.parametrize("package", ONLY_IMPORTER)
def test_each_of_these_has_one_place(package: str) -> None:
    importers = {str(file.path) for file in OURS if any(starts_with(name, package) for name in file.imports())}
    assert importers <= set(ONLY_IMPORTER[package].split())


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    modules = [
        ".".join((*source.package, source.path.stem))
        for source in OURS
        if source.layer in ("config", "policies", "families", "launch")
    ]
    names = [name.removesuffix(".__init__") for name in modules]
    code = "import sys, importlib\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in [*names, "dist_moe.cli.main"]
    )
    code += "print(*sorted({'torch', 'transformers', 'deepspeed', 'tensorboard', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_rooms_are_small() -> None:
    assert violations(EVERYTHING, large_rooms) == []


def test_folders_have_at_most_twelve_modules() -> None:
    modules = Counter(source.path.parent for source in OURS if source.path.stem != "__init__")
    del modules[Path("dist_moe")]  # the ground, with the package's own entry points
    assert {str(folder): count for folder, count in modules.items() if count > MOST_MODULES} == {}


def test_a_file_says_what_it_holds() -> None:
    assert violations(EVERYTHING, unnamed) == []


def test_no_hidden_state() -> None:
    assert violations(OURS, hidden_state) == []


def test_nothing_that_another_process_sends_is_unpickled() -> None:
    assert violations(OURS, unpickling) == []


@pytest.mark.parametrize(
    ("rule", "path", "text", "found"),
    [
        (upward_imports, "dist_moe/moe/x.py", "import dist_moe.train.loop", "must not import ['train']"),
        (upward_imports, "dist_moe/new/x.py", "", "new has no place in the order of imports yet; give it one"),
        (
            large_rooms,
            "tests/x.py",
            "\n" * (LONGEST_FILE + 1),
            f"{LONGEST_FILE + 1} lines; split the file in two nouns",
        ),
        (large_rooms, "tests/x.py", "def f():\n" + " pass\n" * LONGEST_FUNCTION, "f has 61 lines"),
        (large_rooms, "dist_moe/x.py", "def f():\n if a:\n  if b:\n   if c:\n    if d: pass", "f nests 4 deep"),
        (unnamed, "tests/x.py", "pass", "must open with one sentence that says what it holds"),
        (unnamed, "tests/x.py", "'Words'", "the first paragraph must be a sentence"),
        (unnamed, "tests/utils.py", "'A sentence.'", "['utils'] says nothing; use a noun of the design"),
        (hidden_state, "dist_moe/x.py", "def f():\n global a", "global ['a']; return what a stage makes"),
        *((unpickling, "dist_moe/x.py", text, f"{name} {UNPICKLES}") for text, name in CALLS_THAT_UNPICKLE.items()),
    ],
)
def test_a_violation_is_found(rule: Rule, path: str, text: str, found: str) -> None:
    source = Source(Path(path))
    source.__dict__["text"] = text
    assert violations([source, *OURS[:3]], rule) == [f"{path}: {found}"]


def test_every_trap_that_is_tested_has_a_mutant() -> None:
    with_mutant = {mutant.trap for mutant in read_catalogue(ROOT)}
    without = {trap: tests for trap, tests in trap_tests().items() if trap not in with_mutant}
    assert not without, f"add a mutant to tests/mutants/mutants.toml for each of {without}"


@pytest.mark.parametrize(
    ("path", "text", "layer", "imports"),
    [
        ("dist_moe/train/step.py", "from ..moe import router", "train", {"dist_moe.moe.router"}),
        ("dist_moe/cli/main.py", "def f():\n    import dist_moe.train.loop", "cli", {"dist_moe.train.loop"}),
        ("dist_moe/launch/supervise/run_job.py", "from dist_moe import model", "launch", {"dist_moe.model"}),
        ("dist_moe/launch/job.py", "from . import cluster", "launch", {"dist_moe.launch.cluster"}),
    ],
)
def test_imports_are_seen_wherever_they_stand(path: str, text: str, layer: str, imports: set[str]) -> None:
    source = Source(Path(path))
    source.__dict__["text"] = text
    assert (source.layer, source.imports()) == (layer, imports)


def test_depth_counts_blocks_but_not_elif() -> None:
    assert depth(ast.parse("if a:\n    b\nelif c:\n    d\nelif e:\n    f")) == 1
    assert depth(ast.parse("for a in b:\n    if c:\n        with d:\n            while e:\n                f")) == 4
    assert depth(ast.parse("try:\n    a\nexcept E:\n    if b:\n        c")) == 2
