"""Every function of the package that reads input, with valid input to start from."""

import json
import struct

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, read_manifest
from dist_moe.checkpoint.training_state import COUNTERS_FILE, read_counters
from dist_moe.errors import UserError
from dist_moe.launch.hostfile import read_hostfile
from dist_moe.study.load import read_histories
from dist_moe.worker.launcher_variables import LAUNCHERS, SLURM_STEP
from tests.fuzz.inputs import SNIPPETS, VALUES, edited, edited_json
from tests.fuzz.readers import (
    ROOT,
    WEIGHT_MAP,
    by_file,
    encode,
    field_names,
    read_argument,
    read_checkpoint,
    read_config,
    read_deepspeed_file,
    read_documents,
    read_environment,
    read_override,
    read_selection,
    read_shards,
    read_text,
    read_tokenizer,
    read_weights,
    send_to_launch,
    tokenizer_json,
)
from tests.fuzz.result_surfaces import labeled_surfaces, result_surfaces
from tests.fuzz.surface import Surface

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
ARGUMENTS = (
    b"train.steps=40",
    b"data.sources=[/etc/hostname, texts/*.txt]",
    b"model.config.rope_parameters={rope_type: yarn, factor: 4.0}",
    b"cluster.hosts=[{name: a, slots: 0x2}]",
    b"run.dir=~/runs",
    b"checkpoint.resume=/etc",
)
DEEPSPEED = {
    "train_batch_size": 32,
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "wandb": {"enabled": False},
}
PIECES = st.sampled_from(SNIPPETS) | st.binary(max_size=8)
TEXTS = (b"To be, or not to be.\n\n" * 40, "日本語".encode() * 600, b"a" * 5000)
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
MESSAGES = (
    {"output": 1, "text": "step 1"},
    {"output": 2, "text": "a warning\nof two lines"},
    {"terminal": "\x1b[1mbold\x1b[0m 50 %\r"},
    {"report": 'time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: ValueError\nmessage: "bad"\n\ntrace'},
    {"wait_status": 256, "state": "running", "time": 1.0},
    {"wait_status": 9, "state": "finished", "time": 2.0},
)


def all_surfaces() -> list[Surface]:
    """Return every surface."""
    of_runs = [*folder_surfaces(), *result_surfaces()]
    of_texts = [*data_surfaces(), *labeled_surfaces()]
    return [*config_surfaces(), *launch_surfaces(), *checkpoint_surfaces(), *of_runs, *of_texts]


def config_surfaces() -> list[Surface]:
    """Return what a run is configured by."""
    yaml = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml")) if "gpu-8" not in path.name]
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
            "argument",
            edited(ARGUMENTS),
            read_argument,
            [b"train.steps=40", b"run.dir=runs/another"],
            (UserError,),
        ),
        Surface(
            "DeepSpeed file",
            edited([encode(DEEPSPEED)]) | edited_json([DEEPSPEED]),
            by_file("ds.json", read_deepspeed_file),
            [encode(DEEPSPEED)],
            (UserError,),
        ),
    ]


def launch_surfaces() -> list[Surface]:
    """Return what tells a launch and its workers about hosts and each other."""
    names = {*SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"}
    for each in LAUNCHERS:
        names |= {each.rank, each.local_rank, *each.world_size, *each.local_world_size}
    numbers = st.sampled_from(["0", "1", "2", "-1", "", "1(x2)", "\u0663", "9" * 30]) | st.text(max_size=5)
    messages = b"".join(encode(message) + b"\n" for message in MESSAGES)
    lines = st.lists(edited_json(MESSAGES), max_size=4).map(lambda parts: b"\n".join([*parts, b""]))
    hosts = st.text("host01:,@ x", max_size=20)
    return [
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
    """Return the files of a checkpoint, and a whole one."""
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
            "checkpoint",
            st.tuples(
                st.integers(0, 99),
                st.sampled_from(["edited"] * 5 + ["folder", "pipe", "device", "dead link"]),
                st.lists(st.tuples(st.floats(0, 1), PIECES), min_size=1, max_size=3),
                st.booleans(),
            ),
            read_checkpoint,
            [(0, "edited", [], True)],
            (UserError,),
        ),
    ]


def folder_surfaces() -> list[Surface]:
    """Return the files of a Hugging Face folder and of a run."""
    return [
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
        Surface("text", edited(TEXTS), by_file("a.txt", read_text), TEXTS, (UserError,)),
        Surface(
            "jsonl",
            edited(lines) | edited_json([{"text": "a", "name": "b"}]),
            by_file("a.jsonl", read_documents),
            lines,
            (UserError,),
        ),
    ]
