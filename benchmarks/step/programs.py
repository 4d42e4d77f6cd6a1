"""The programs that can run a training step: how their processes are started, and which cases they refuse."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.cases import Entry, StepCase
from benchmarks.environment import ROOT
from benchmarks.step.native_packages import install_transformers
from benchmarks.step.session import CannotRun, Command
from benchmarks.step.setting import (
    BETAS,
    GRADIENT_CLIPPING,
    LEARNING_RATE,
    WEIGHT_DECAY,
    ZERO_STAGE,
    PeerSetting,
    write_text,
)
from dist_moe.config import load_config
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher, load_launcher
from dist_moe.worker.network import free_port

STEPS = 1_000_000
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Variables of glibc with which freed memory stays with the process."""
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """Where a program keeps its files in one case.

    Attributes:
        folder: A new folder of the program.
        text: The folder of the text, which all programs of the case share.
        vocabulary: Token ids of the text.
        end_id: The id of the end token.
    """

    folder: Path
    text: Path
    vocabulary: int
    end_id: int


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        about: What it is, for the README and `--list`.
        commands: Returns the processes that train a case; raises CannotRun with a reason.
    """

    about: str
    commands: Callable[[StepCase, Entry, Place], Sequence[Command]]


def configuration(case: StepCase, folder: Path, backend: str) -> dict[str, Any]:
    """Return this package's configuration of a case, as a user would write it."""
    return {
        "run": {"dir": str(folder / "run"), "threads": 1},
        "model": {"architecture": case.architecture, "config": dict(case.model)},
        "data": {
            "sources": list(case.sources),
            "sequence_length": case.length,
            "tokenizer": case.tokenizer,
            "vocabulary": case.vocabulary,
        },
        "train": {
            "steps": STEPS,
            "global_batch_size": case.workers * case.sequences,
            "micro_batch_size": case.sequences,
            "precision": case.precision,
            "learning_rate": LEARNING_RATE,
            "betas": list(BETAS),
            "weight_decay": WEIGHT_DECAY,
            "gradient_clipping": GRADIENT_CLIPPING,
        },
        "parallel": {"expert_parallel": case.expert_parallel, "zero_stage": ZERO_STAGE, "backend": backend},
        # A checkpoint by time would fall into a turn by chance.
        "checkpoint": {"interval_minutes": 0},
    }


def write_configuration(case: StepCase, folder: Path, backend: str) -> Path:
    """Write the configuration into a folder, and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    with path.open("w") as file:
        YAML().dump(configuration(case, folder, backend), file)
    return path


def prepare(case: StepCase, folder: Path, steps: int) -> tuple[int, int]:
    """Tokenize the text of a case, and write the rows of its steps -> its vocabulary, and the id of its end token."""
    from dist_moe.data.corpus import TokenizedData
    from dist_moe.data.stream import Stream
    from dist_moe.train.setup import tokenize

    config = load_config(write_configuration(case, folder, "gloo"), case.overrides)
    data = tokenize(config)
    assert isinstance(data, TokenizedData)
    stream = Stream(data.train, case.length, config.run.seed)
    write_text(folder, stream.batch(0, steps * config.train.global_batch_size))
    return data.tokenizer.vocab_size, data.tokenizer.end_id


def ours(launcher: str, backend: str) -> Callable[[StepCase, Entry, Place], Sequence[Command]]:
    """Return what starts this package's workers by one of its launchers."""

    def commands(case: StepCase, entry: Entry, place: Place) -> Sequence[Command]:
        path = write_configuration(case, place.folder, backend)
        overrides = (*case.overrides, *entry.overrides)
        config = load_config(path, overrides)
        request = LaunchRequest(config, path, overrides, asked_workers=case.workers, module="benchmarks.step.ours")
        starter = load_launcher(launcher)
        assert isinstance(starter, ProcessLauncher)
        try:
            command = starter.command(request, with_path())
        except RuntimeError as error:  # the launcher, or the MPI that it needs, is not installed
            raise CannotRun(str(error)) from error
        return [Command(command.argv, command.environment)]

    return commands


def peer(
    program: str, fused: bool = False, kept_memory: bool = False
) -> Callable[[StepCase, Entry, Place], Sequence[Command]]:
    """Return what starts the workers of a peer, one process for each rank.

    Args:
        program: The name in `benchmarks.step.peer`.
        fused: Use torch's fused AdamW.
        kept_memory: Set KEPT_MEMORY.
    """

    def commands(case: StepCase, entry: Entry, place: Place) -> Sequence[Command]:
        refuse_routing(case, entry)
        if program == "classic" and case.architecture != "qwen3_moe":
            raise CannotRun("its experts are put into a Qwen3-MoE model here, and this case has another one")
        model = {**case.model, "vocab_size": place.vocabulary, "bos_token_id": None, "pad_token_id": None}
        model["eos_token_id"] = place.end_id
        place.folder.mkdir(parents=True, exist_ok=True)
        setting = PeerSetting(
            program=program,
            architecture=case.architecture,
            model=model,
            bf16=case.precision == "bf16",
            expert_parallel=case.expert_parallel,
            sequences=case.sequences,
            fused=fused,
            text=str(place.text),
            scratch=str(place.folder),
        )
        path = place.folder / "setting.json"
        setting.write(path)
        argv = (sys.executable, "-m", "benchmarks.step.peer", str(path))
        added = {"DS_ACCELERATOR": "cpu", **(KEPT_MEMORY if kept_memory else {})}
        return [Command(argv, environment) for environment in rank_environments(case.workers, added)]

    return commands


def native(case: StepCase, entry: Entry, place: Place) -> Sequence[Command]:
    """Return what starts the workers of transformers' own expert parallelism, with the newest transformers."""
    if case.expert_parallel == 1:
        raise CannotRun("the case has no expert parallelism; without it, this is the program hf over FSDP")
    packages = install_transformers()
    path = os.pathsep.join([str(packages), str(ROOT)])
    started = peer("hf-native", fused=True, kept_memory=True)(case, entry, place)
    return [Command(command.argv, {**command.environment, "PYTHONPATH": path}) for command in started]


def autoep_over_mpi(case: StepCase, entry: Entry, place: Place) -> Sequence[Command]:
    """Say why DeepSpeed has no MPI here."""
    import torch.distributed as dist

    if not dist.is_mpi_available():
        raise CannotRun("DeepSpeed's backend mpi is that of torch, and this build of torch has none")
    raise CannotRun("this build of torch has MPI, with which this benchmark does not start DeepSpeed")


def refuse_routing(case: StepCase, entry: Entry) -> None:
    """Refuse what only this package's router does."""
    for override in (*case.overrides, *entry.overrides):
        if override.startswith(("router.", "balance.")):
            raise CannotRun(f"it has no {override}")


def with_path() -> dict[str, str]:
    """Return this environment for workers with one thread that find this folder `benchmarks`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **SINGLE_THREAD, "PYTHONPATH": path}


def rank_environments(workers: int, added: dict[str, str]) -> list[dict[str, str]]:
    """Return the environment of each rank, as torchrun sets it, for workers of this host."""
    shared = {
        **with_path(),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        **added,
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]


PROGRAMS = {
    "ours-gloo": Program("this package, gloo, started by the launcher deepspeed", ours("deepspeed", "gloo")),
    "ours-mpi": Program("this package, MPI, started by the launcher mpirun", ours("mpirun", "mpi")),
    "autoep": Program("DeepSpeed AutoEP over gloo, with its own defaults", peer("autoep")),
    "autoep-tuned": Program(
        "the same with torch's fused AdamW, and memory that stays with the process",
        peer("autoep", fused=True, kept_memory=True),
    ),
    "autoep-mpi": Program("DeepSpeed AutoEP over MPI", autoep_over_mpi),
    "hf": Program("transformers' grouped_mm in DeepSpeed ZeRO, each rank with all experts", peer("hf")),
    "hf-tuned": Program("the same, tuned as autoep-tuned", peer("hf", fused=True, kept_memory=True)),
    "hf-native": Program("transformers' own expert parallelism, its newest version, tuned likewise", native),
    "classic": Program(
        "DeepSpeed's MoE layer, which drops tokens over the capacity, tuned likewise",
        peer("classic", fused=True, kept_memory=True),
    ),
}
