"""A weights folder as it lies on disk: its config.json, and in which file, and under which name, each tensor is.

Experts stand there one by one (`mlp.experts.3.up_proj.weight`), as `save_pretrained` and the published folders have
them, or all of a layer in one tensor (`mlp.experts.gate_up_proj`), as they lie in the memory of transformers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.tensor_header import FLOATS, Stored, read_header
from dist_moe.config.untrusted import read_json

INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(.+)\.experts\.(0|[1-9][0-9]{0,8})\.(gate|up|down)_proj\.weight")
FUSED = re.compile(r"(.+)\.experts\.(gate_up|down)_proj")


class Source(NamedTuple):
    """Where the values of a tensor are: all of a stored one, or the part of an expert in one of all experts.

    half: of its gate_up_proj, 0 gate, 1 up; None for down_proj and for a tensor of its own.
    """

    stored: Stored
    expert: int | None = None
    half: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the part."""
        if self.expert is None:
            return self.stored.shape
        _, rows, *rest = self.stored.shape
        return (rows if self.half is None else rows // 2, *rest)

    def read(self, file: Any) -> Tensor:
        """The values, as they are stored; nothing else is read."""
        if self.expert is None:
            found: Tensor = file.get_tensor(self.stored.name)
            return found
        first = self.shape[0] * (self.half or 0)
        part: Tensor = file.get_slice(self.stored.name)[self.expert : self.expert + 1, first : first + self.shape[0]]
        return part[0]


def raw_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Errors: WeightsError."""
    path = folder / "config.json"
    if not path.exists():
        raise WeightsError(f"{folder} has no config.json; give the step-NNNNNN folder of a run, or its model folder")
    try:
        raw = read_json(path, follow=True)
        if not isinstance(raw["model_type"], str):
            raise TypeError(f"model_type={raw['model_type']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is no Hugging Face config ({error!r}); use another checkpoint") from None
    return raw


def tensor_files(folder: Path) -> dict[str, Stored]:
    """Every stored tensor by name: of the files that the index names, or of all where there is no index.

    Errors: WeightsError, and CheckpointError for a file that cannot be read.
    """
    files = indexed(folder) if (folder / INDEX).exists() else None
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors") if files is None else {folder / name for name in files.values()}):
        header = read_header(path)
        if twice := sorted(set(found) & set(header)):
            raise WeightsError(f"{folder} holds {twice[:3]} in two files; use the folder of one complete checkpoint")
        found |= header
    if not found:
        raise WeightsError(
            f"{folder} holds no *.safetensors; give the step-NNNNNN folder of a run, or its model folder"
        )
    return found


def indexed(folder: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, as the index says."""
    try:
        files = read_json(folder / INDEX, follow=True)["weight_map"]
        strange = [name for name in files.values() if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if strange:
            raise ValueError(f"it names files outside of its folder: {strange[:3]}")
        if missing := sorted({name for name in files.values() if not (folder / name).is_file()}):
            raise ValueError(f"of the files that it names, {missing} are not there")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder / INDEX} cannot be used ({error}); use another folder") from None
    return dict(files)


def find_sources(
    folder: Path, wanted: Mapping[str, Tensor], experts: Mapping[str, int], further: Iterable[str] = ()
) -> dict[str, Source]:
    """Where each of the wanted tensors is.

    experts: the experts of each MoE layer by its name; the folder must know those of other ranks too. further: what
    else the folder may hold, as patterns. Errors: WeightsError with all that is missing, unexpected, or does not fit.
    """
    found = tensor_files(folder)
    sources = {name: source for name in wanted if (source := _source(found, name)) is not None}
    all_experts = {
        f"{layer}.experts.{expert}.{kind}_proj.weight"
        for layer, count in experts.items()
        for expert in range(count)
        for kind in ("gate", "up", "down")
    }
    missing = sorted({*wanted, *(name for name in all_experts if _source(found, name) is None)} - set(sources))
    used = {source.stored.name for source in sources.values()} | all_experts
    others = (name for name in found if name not in used and not any(re.match(each, name) for each in further))
    unexpected = sorted(name for name in others if not _fused_of(name, experts))
    if missing or unexpected:
        raise WeightsError(
            f"{folder} does not fit: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; use the "
            "folder of one complete checkpoint"
        )
    _check_shapes(folder, sources, wanted, experts)
    return sources


def _source(found: Mapping[str, Stored], name: str) -> Source | None:
    if name in found:
        return Source(found[name])
    if (match := EXPERT.fullmatch(name)) is None:
        return None
    layer, expert, kind = match[1], int(match[2]), match[3]
    stored = found.get(f"{layer}.experts.{'down' if kind == 'down' else 'gate_up'}_proj")
    if stored is None or len(stored.shape) != 3 or expert >= stored.shape[0]:
        return None
    return Source(stored, expert, {"gate": 0, "up": 1, "down": None}[kind])


def _fused_of(name: str, experts: Mapping[str, int]) -> bool:
    """Whether a tensor holds all experts of one of the layers."""
    match = FUSED.fullmatch(name)
    return match is not None and match[1] in experts


def _check_shapes(
    folder: Path, sources: Mapping[str, Source], wanted: Mapping[str, Tensor], experts: Mapping[str, int]
) -> None:
    misshapen, strange = [], []
    for name, source in sorted(sources.items()):
        stored, fused = source.stored, FUSED.fullmatch(source.stored.name)
        if fused is not None and stored.shape[0] != experts[fused[1]]:
            misshapen.append(f"{stored.name} {list(stored.shape)} instead of {experts[fused[1]]} experts")
        elif source.shape != tuple(wanted[name].shape):
            misshapen.append(f"{name} {list(source.shape)} instead of {list(wanted[name].shape)}")
        if stored.dtype not in FLOATS:
            strange.append(f"{name} {stored.dtype}")
    if misshapen:
        raise WeightsError(f"{folder} holds tensors of another shape: {misshapen}; its config.json is of another model")
    if strange:
        raise WeightsError(f"{folder} holds tensors that are not {', '.join(FLOATS)}: {strange}; convert them first")


def read_sources(sources: Mapping[str, Source]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each source, file by file: each is opened once, and one tensor is in memory at a time."""
    by_file: dict[Path, list[str]] = {}
    for name, source in sources.items():
        by_file.setdefault(source.stored.file, []).append(name)
    for path, names in sorted(by_file.items()):
        try:
            yield from _read(path, {name: sources[name] for name in names})
        except SafetensorError as error:
            raise WeightsError(f"{path} cannot be read ({error}); use another checkpoint") from None


def _read(path: Path, sources: Mapping[str, Source]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name, source in sources.items():
            yield name, source.read(file)


def stored_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of `names` in the folder, as it is stored. Errors: WeightsError where one is missing."""
    found, wanted = tensor_files(folder), sorted(set(names))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise WeightsError(f"{folder} lacks {missing}; use the folder of one complete checkpoint")
    return read_sources({name: Source(found[name]) for name in wanted})
