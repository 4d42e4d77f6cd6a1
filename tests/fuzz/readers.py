"""Functions that read one damaged input each, as the package does."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dist_moe.checkpoint.format.hf_folder import read_headers
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, file_entry, write_manifest
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.inspect import inspect_checkpoint
from dist_moe.checkpoint.verify import verify_checkpoints
from dist_moe.config import load_config, resolve
from dist_moe.data.corpus import prepare
from dist_moe.data.files import local_files, read_local
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.tokenizer import byte_alphabet
from dist_moe.launch.hostfile import filter_hosts
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.train.data_check import data_violations
from dist_moe.worker.rank_info import rank_info_from_env
from tests.dist.resumable import command, write_text

ROOT = Path(__file__).resolve().parents[2]
QUICK_START = ROOT / "configs" / "quickstart.yaml"
WEIGHT_MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
GREETING = {"token": "", "rank": 0, "size": 2, "host": "here", "agent_pid": 17}


def encode(value: object) -> bytes:
    """Return the value as JSON."""
    return json.dumps(value).encode()


def write(path: Path, content: bytes) -> Path:
    """Write a file of the folder in which an input is tried."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def by_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Return a reader that writes its input to a file first; `read` gets the folder."""

    def read_file(content: bytes, folder: Path) -> object:
        write(folder / name, content)
        return read(folder)

    return read_file


def read_config(content: bytes, folder: Path) -> object:
    """Read a configuration, and check whether it fits two workers."""
    path = write(folder / "run.yaml", content)
    return resolve(
        load_config(path, workers=2, further_check=data_violations), workers=2, further_check=data_violations
    )


def read_override(override: tuple[str, Any], folder: Path) -> object:
    """Set one field of the quick start to any value."""
    key, value = override
    return read_argument(f"{key}={value if isinstance(value, str) else json.dumps(value)}".encode(), folder)


def read_argument(argument: bytes, folder: Path) -> object:
    """Read an argument `section.key=value` as Python gives it, whose bytes need not be UTF-8."""
    overrides = [os.fsdecode(argument)]
    return resolve(
        load_config(QUICK_START, overrides, workers=2, further_check=data_violations),
        workers=2,
        further_check=data_violations,
    )


def read_deepspeed_file(folder: Path) -> object:
    """Read the quick start with a DeepSpeed JSON file."""
    return resolve(load_config(QUICK_START, [f"train.deepspeed={folder / 'ds.json'}"], workers=2), workers=2)


def read_text(folder: Path) -> object:
    """Read, split and tokenize a text."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return prepare([str(folder / "a.txt")], "bytes", 300, 0.1, folder / "cache")


@functools.cache
def checkpoint() -> Path:
    """Return a checkpoint of a run of two steps, made once."""
    folder = Path(tempfile.mkdtemp(prefix="dist-moe-fuzz-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run(
        command(write_text(folder), folder / "run", "train.steps=2"),
        cwd=ROOT,
        check=True,
        timeout=120,
        capture_output=True,
    )
    return folder / "run" / "checkpoints" / "step-000002"


def read_checkpoint(damage: tuple[int, str, Sequence[tuple[float, bytes]], bool], folder: Path) -> object:
    """Inspect and verify a checkpoint of which one file is something else, with its digests or new ones."""
    number, kind, edits, has_digests = damage
    copy = folder / "step-000002"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint(), copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    damaged = files[number % len(files)]
    damage_file(damaged, kind, edits)
    if has_digests and damaged.name != MANIFEST_NAME:
        listed = {str(path.relative_to(copy)): path for path in files if path.is_file() and path.name != MANIFEST_NAME}
        write_manifest(copy, 2, {name: file_entry(path) for name, path in listed.items()})
    verify_checkpoints(copy)
    return inspect_checkpoint(copy)


def damage_file(path: Path, kind: str, edits: Sequence[tuple[float, bytes]]) -> None:
    """Replace a file by something else, or edit its content."""
    content = path.read_bytes()
    if kind == "edited":
        for place, piece in edits:
            start = int(place * len(content))
            content = content[:start] + piece + content[start + len(piece) :]
        path.write_bytes(content)
        return
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dead link":
        path.symlink_to(path.parent / "gone")


def field_names() -> list[str]:
    """Return every field of the quick start by its dotted name."""
    sections = load_config(QUICK_START).model_dump()
    return [f"{name}.{key}" for name, fields in sections.items() for key in fields]


def read_selection(selection: tuple[str, str], folder: Path) -> object:
    """Select hosts as by cluster.include or cluster.exclude."""
    include, exclude = selection
    return filter_hosts({"host0": [0, 1], "host1": [0, 1]}, include or None, exclude or None)


def read_weights(content: bytes, folder: Path) -> object:
    """Read the names of a Hugging Face folder's tensors by its index."""
    for name in ("a", "b"):
        write(folder / WEIGHT_MAP[name], save({name: np.zeros(4, np.float32)}))
    write(folder / "model.safetensors.index.json", content)
    return read_headers(folder)


def read_tokenizer(content: bytes, folder: Path) -> object:
    """Load a tokenizer, and use it."""
    write(folder / "tokenizer_config.json", b'{"eos_token": "<end>"}')
    write(folder / "tokenizer.json", content)
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(tokenizer.encode("the end"))


def read_shards(folder: Path) -> object:
    """Open the shards of an optimizer, and read a tensor."""
    with ShardReader(folder) as reader:
        return reader.read("exp_avg", "weight", 0, 4)


def read_documents(folder: Path) -> object:
    """Read all documents of the folder."""
    pattern = str(folder / "*.jsonl")
    return list(read_local(pattern, local_files(pattern)))


def read_environment(variables: dict[str, str], folder: Path) -> object:
    """Read the rank from variables of several launchers."""
    return rank_info_from_env(variables)


def send_to_launch(stream: tuple[bool, bytes], folder: Path) -> object:
    """Connect to a launch that waits for two workers, with or without its token, and send anything."""
    knows_token, content = stream
    with WorkerMonitor("127.0.0.1", 2, folder, multi_host=False) as monitor:
        with socket.create_connection((monitor.rendezvous.address, monitor.rendezvous.port)) as connection:
            if knows_token:
                greeting = GREETING | {"token": monitor.rendezvous.token}
                connection.sendall(encode(greeting) + b"\n")
            connection.sendall(content)
        for _ in range(4):
            monitor.wait(0.01)
            monitor.poll()
        assert monitor.size == 2
        return monitor.failures()


def tokenizer_json() -> bytes:
    """Return a small byte-level BPE, as its library writes it."""
    vocabulary = {symbol: number for number, symbol in enumerate([*sorted(byte_alphabet()), "he", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str()).encode()
