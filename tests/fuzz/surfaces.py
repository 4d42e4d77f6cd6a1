"""Every function of the package that reads input, with valid input to start from."""

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import read_headers, read_raw_config
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, read_manifest
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.training_state import COUNTERS_FILE, read_counters
from dist_moe.config import load_config, resolve
from dist_moe.data.files import local_files, read_local
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.tokenizer import byte_alphabet
from dist_moe.errors import UserError
from dist_moe.launch.hostfile import filter_hosts, read_hostfile
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.study.load import read_histories
from dist_moe.worker.launcher_variables import LAUNCHERS, SLURM_STEP
from dist_moe.worker.rank_info import rank_info_from_env
from tests.fuzz.inputs import SNIPPETS, VALUES, edited, edited_json
from tests.fuzz.surface import Surface

ROOT = Path(__file__).resolve().parents[2]
QUICK_START = ROOT / "configs" / "quickstart.yaml"
HOSTFILES = (
    b"host0 slots=2\nhost1 slots=2\n",
    b"# two hosts\n10.0.0.1:2\n10.0.0.2:2\n",
    b"a\nb\n",
    b"node0 slots=4 max_slots=8\r\n",
)
DIGEST = "0" * 32
MANIFEST = {
    "format": 2,
    "step": 5,
    "files": {"model/config.json": {"bytes": 3, "xxh3_128": DIGEST}, "config.yaml": {"bytes": 1, "xxh3_128": DIGEST}},
}
COUNTERS = {
    "step": 5,
    "taken": 5,
    "controller": [0.5, 0.0, 0.0, 0.4],
    "corpus": "ab",
    "workers": 2,
    "expert_parallel": 2,
    "zero_stage": 1,
    "bf16": False,
}
HF_CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "hidden_size": 8}
WEIGHT_MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
INDEX = {"metadata": {"total_size": 32}, "weight_map": WEIGHT_MAP}
STEP = {
    "event": "step",
    "step": 1,
    "skipped": False,
    "max_vio": 0.5,
    "max_vio_floor": 0.1,
    "max_vio_per_layer": [0.5],
    "load": [[4, 2]],
}
GREETING = {"token": "", "rank": 0, "size": 2, "host": "here", "agent_pid": 17}
MESSAGES = (
    {"output": 1, "text": "step 1"},
    {"output": 2, "text": "a warning\nof two lines"},
    {"terminal": "\x1b[1mbold\x1b[0m 50 %\r"},
    {"report": 'time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: ValueError\nmessage: "bad"\n\ntrace'},
    {"wait_status": 256, "state": "running", "time": 1.0},
    {"wait_status": 9, "state": "finished", "time": 2.0},
)


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
    return resolve(load_config(write(folder / "run.yaml", content), workers=2), workers=2)


def read_override(override: tuple[str, Any], folder: Path) -> object:
    """Set one field of the quick start to any value."""
    key, value = override
    text = value if isinstance(value, str) else json.dumps(value)
    return resolve(load_config(QUICK_START, [f"{key}={text}"], workers=2), workers=2)


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
    return list(read_local(local_files(str(folder / "*.jsonl"))))


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


def all_surfaces() -> list[Surface]:
    """Return every surface."""
    return [*launch_surfaces(), *checkpoint_surfaces(), *data_surfaces()]


def launch_surfaces() -> list[Surface]:
    """Return what is read before workers run, and while they do."""
    yaml = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml")) if "gpu-8" not in path.name]
    names = {*SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"}
    for each in LAUNCHERS:
        names |= {each.rank, each.local_rank, *each.world_size, *each.local_world_size}
    numbers = st.sampled_from(["0", "1", "2", "-1", "", "1(x2)", "\u0663", "9" * 30]) | st.text(max_size=5)
    messages = b"".join(encode(message) + b"\n" for message in MESSAGES)
    lines = st.lists(edited_json(MESSAGES), max_size=4).map(lambda parts: b"\n".join([*parts, b""]))
    hosts = st.text("host01:,@ x", max_size=20)
    return [
        Surface("config file", edited(yaml), read_config, yaml, (UserError,)),
        Surface(
            "config value",
            st.tuples(st.sampled_from(field_names()), VALUES),
            read_override,
            [("train.steps", 40), ("run.seed", 7)],
            (UserError,),
        ),
        Surface(
            "hostfile",
            edited(HOSTFILES),
            by_file("hosts", lambda folder: read_hostfile(str(folder / "hosts"))),
            HOSTFILES,
            (UserError,),
        ),
        Surface(
            "host selection",
            st.tuples(hosts, st.sampled_from(["", "host0", "host1:0"])),
            read_selection,
            [("host0", ""), ("host0:1@host1", "")],
            (UserError,),
        ),
        Surface(
            "rank",
            st.dictionaries(st.sampled_from(sorted(names)), numbers, max_size=8),
            read_environment,
            [{}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}],
            (UserError,),
        ),
        Surface(
            "launch",
            st.tuples(st.booleans(), edited([messages]) | lines | st.sampled_from(SNIPPETS)),
            send_to_launch,
            [(True, messages), (False, messages), (True, b"")],
            (OSError,),
        ),
    ]


def checkpoint_surfaces() -> list[Surface]:
    """Return the files of a checkpoint and of a Hugging Face folder, and of a run."""
    shard = save({"exp_avg:weight:0": np.zeros(4, np.float32), "random:cpu/0:0": np.zeros(8, np.uint8)})
    header = json.loads(shard[8 : 8 + struct.unpack("<Q", shard[:8])[0]])
    headers = edited_json([header]).map(lambda text: struct.pack("<Q", len(text)) + text + bytes(24))
    return [
        Surface(
            "manifest",
            edited_json([MANIFEST]) | edited([encode(MANIFEST)]),
            by_file(MANIFEST_NAME, read_manifest),
            [encode(MANIFEST)],
            (CheckpointError,),
        ),
        Surface(
            "counters",
            edited_json([COUNTERS]) | edited([encode(COUNTERS)]),
            by_file(COUNTERS_FILE, read_counters),
            [encode(COUNTERS)],
            (CheckpointError,),
        ),
        Surface(
            "tensors",
            edited([shard]) | headers,
            by_file("rank-00000.safetensors", read_shards),
            [shard],
            (CheckpointError,),
        ),
        Surface(
            "model config",
            edited_json([HF_CONFIG]) | edited([encode(HF_CONFIG)]),
            by_file("config.json", read_raw_config),
            [encode(HF_CONFIG)],
            (UserError,),
        ),
        Surface(
            "weights index",
            edited_json([INDEX]) | edited([encode(INDEX)]),
            read_weights,
            [encode(INDEX)],
            (UserError,),
        ),
        Surface(
            "metrics",
            edited_json([STEP]).map(lambda line: line + b"\n") | edited([encode(STEP) + b"\n"]),
            by_file("metrics.jsonl", lambda folder: read_histories([folder])),
            [encode(STEP) + b"\n"],
            (UserError,),
        ),
    ]


def data_surfaces() -> list[Surface]:
    """Return the files of a text and of a tokenizer."""
    lines = [b'{"text": "to be", "name": "a", "domain": "d"}\n{"text": "or not"}\n', b'{"text": "\\u00e9"}\r\n']
    bpe = tokenizer_json()
    return [
        Surface("tokenizer", edited([bpe]) | edited_json([json.loads(bpe)]), read_tokenizer, [bpe], (UserError,)),
        Surface(
            "jsonl",
            edited(lines) | edited_json([{"text": "a", "name": "b"}]),
            by_file("a.jsonl", read_documents),
            lines,
            (UserError,),
        ),
    ]
