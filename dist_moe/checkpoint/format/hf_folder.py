"""A weights folder on disk: its config.json, and which file holds each tensor, under which name.

Experts are stored one by one (`mlp.experts.3.up_proj.weight`), as `save_pretrained` and published folders have them,
or fused, all of a layer in one tensor (`mlp.experts.gate_up_proj`), as transformers has them in memory.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.family_names import NO_NAMES, FamilyNames, Piece
from dist_moe.checkpoint.format.tensor_header import FLOAT_DTYPES, INTEGER_DTYPES, StoredTensor, read_header
from dist_moe.errors import reason_of
from dist_moe.files import exists
from dist_moe.text import counted, listed
from dist_moe.untrusted import read_json

INDEX_NAME = "model.safetensors.index.json"
# At most nine digits, in ASCII and without leading zeros: other spellings of a number are unexpected tensors.
EXPERT_PATTERN = re.compile(r"(.+)\.experts\.(0|[1-9][0-9]{0,8})\.(gate|up|down)_proj\.(?:weight|bias)")
FUSED_PATTERN = re.compile(r"(.+)\.experts\.(gate_up|up|down)_proj(_bias)?")
STACKED_PATTERN = re.compile(r"(.+)\.experts\.(0|[1-9][0-9]{0,8})\.((?:gate_up|up|down)_proj(?:_bias)?)")
"""Of a tensor of one expert as experts with biases, clamps or transposed weights have it in memory."""


class LayerExperts(NamedTuple):
    """The experts of an MoE layer: how many there are, and the names of the tensors of each."""

    number: int
    parts: tuple[str, ...]


class TensorSource(NamedTuple):
    """Where the values of a tensor are stored.

    Attributes:
        stored: The stored tensor: this one, or the fused one of all experts.
        expert: Index in the fused tensor; None if the tensor is stored by itself.
        half: Of the fused gate_up_proj: 0 for gate, 1 for up; None for down_proj, and if stored by itself.
        is_transposed: Whether the last two dimensions are swapped in the file.
        row: The only row of the stored tensor that is read, as [1, ...]; None for all.
    """

    stored: StoredTensor
    expert: int | None = None
    half: int | None = None
    is_transposed: bool = False
    row: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        stored = self.stored.shape
        if self.row is not None:
            return (1, *stored[1:])
        if self.is_transposed:
            stored = (*stored[:-2], *stored[:-3:-1])
        if self.expert is None:
            return stored
        _, rows, *rest = stored
        return (rows if self.half is None else rows // 2, *rest)

    def read(self, file: Any) -> Tensor:
        """Read the values from the open file, in the stored dtype; nothing else is read."""
        if self.row is not None:
            one_row: Tensor = file.get_slice(self.stored.name)[self.row : self.row + 1]
            return one_row
        if self.expert is None:
            tensor: Tensor = file.get_tensor(self.stored.name)
            return tensor.mT if self.is_transposed else tensor
        first = self.shape[0] * (self.half or 0)
        rows, stacked = slice(first, first + self.shape[0]), file.get_slice(self.stored.name)
        one = slice(self.expert, self.expert + 1)
        part: Tensor = stacked[one, :, rows].mT if self.is_transposed else stacked[one, rows]
        return part[0]


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json as plain values.

    Raises:
        WeightsError: It is missing or invalid.
    """
    path = folder / "config.json"
    if not exists(path):
        raise WeightsError(f"{folder} has no config.json; use the step-NNNNNN folder of a run, or its model folder")
    try:
        raw = read_json(path, follow=True)
        if not isinstance(raw["model_type"], str):
            raise TypeError(f"model_type={raw['model_type']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is not a Hugging Face config ({error!r}); use another checkpoint") from None
    return raw


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read which tensors the folder holds, by name: in the files that the index names, or in all of the model.

    Raises:
        WeightsError: There are none, or a name occurs in two files.
        CheckpointError: A file cannot be read.
    """
    index = read_index(folder) if exists(folder / INDEX_NAME) else None
    named = {folder / name for name in index.values()} if index is not None else set(folder.glob("model*.safetensors"))
    paths = named or set(folder.glob("*.safetensors"))
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(paths):
        header = read_header(path)
        if duplicates := sorted(set(tensors) & set(header)):
            raise WeightsError(
                f"{folder} holds {duplicates[:3]} in two files; use the folder of one complete checkpoint"
            )
        tensors |= header
    if not tensors:
        raise WeightsError(f"{folder} holds no *.safetensors; use the step-NNNNNN folder of a run, or its model folder")
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Read the index: file name by tensor name.

    Raises:
        WeightsError: It is invalid, or names files that do not exist.
    """
    try:
        index = read_json(folder / INDEX_NAME, follow=True)["weight_map"]
        outside = [name for name in index.values() if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if outside:
            raise ValueError(f"it names files outside of its folder: {outside[:3]}")
        if missing := sorted({name for name in index.values() if not (folder / name).is_file()}):
            raise ValueError(f"the files {missing} do not exist")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder / INDEX_NAME} cannot be used ({reason_of(error)}); use another folder") from None
    return dict(index)


def find_sources(
    folder: Path,
    wanted: Mapping[str, Tensor],
    experts: Mapping[str, LayerExperts],
    ignored: Iterable[str] = (),
    names: FamilyNames = NO_NAMES,
    has_others: bool = False,
) -> dict[str, TensorSource]:
    """Find where each wanted tensor is stored.

    Args:
        folder: A weights folder.
        wanted: The tensors to load, by their names in the folder.
        experts: Those of each MoE layer by its name. The folder must hold all of them, also those that other ranks
            load.
        ignored: Patterns of names that the folder may hold in addition.
        names: Those of the folder's tensors that differ from `wanted`.
        has_others: Whether tensors outside the layers of `names` are those of another modality, and ignored.

    Raises:
        WeightsError: With every missing, unexpected and misshapen tensor.
    """
    ours = {name: our for our, name in {**names.stored, **names.stacked}.items()}
    stored = {ours.get(name, name): tensor for name, tensor in read_headers(folder).items()}
    pieces = {piece_name(name, index): piece for name, each in names.pieces.items() for index, piece in enumerate(each)}
    found = {name: source for name in wanted if (source := _find_source(stored, name, pieces)) is not None}
    sources = {name: _oriented(source, tuple(wanted[name].shape), names.transposed) for name, source in found.items()}
    all_experts = {
        name
        for layer, of_layer in experts.items()
        for expert in range(of_layer.number)
        for part in of_layer.parts
        for name in _with_pieces(f"{layer}.experts.{expert}.{part}", names)
    }
    sources_of_all = {name: _find_source(stored, name, pieces) for name in all_experts}
    missing = sorted({*wanted, *(name for name, source in sources_of_all.items() if source is None)} - set(sources))
    used = {source.stored.name for source in (*sources.values(), *sources_of_all.values()) if source is not None}
    known = used | names.others
    others = (
        name
        for name, tensor in stored.items()
        if tensor.name not in known
        and not any(re.search(each, found) for each in ignored for found in (name, tensor.name))
        if not has_others or tensor.name.startswith(names.prefix)
    )
    unexpected = sorted(name for name in others if not _is_fused_of(name, experts))
    if missing or unexpected:
        raise WeightsError(
            f"{folder} does not match the model: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; "
            "use the folder of one complete checkpoint"
        )
    _check_shapes(folder, sources, wanted, experts)
    return sources


def _oriented(source: TensorSource, shape: tuple[int, ...], swapped: Collection[str]) -> TensorSource:
    """Return the source of a tensor of this shape; stacked tensors that may be transposed are so by their shape."""
    if source.stored.name not in swapped or (source.expert is not None and source.shape == shape):
        return source
    return source._replace(is_transposed=True)


def piece_name(name: str, index: int) -> str:
    """Return the name of a piece of a tensor, which no tensor has."""
    return f"{name}#{index}"


def parts_in_files(wanted: Mapping[str, Tensor], names: FamilyNames) -> dict[str, Tensor]:
    """Return the tensors of a rank as the files have them: some in pieces, by `piece_name`."""
    parts = {name: tensor for name, tensor in wanted.items() if name not in names.pieces}
    for name in wanted.keys() & names.pieces.keys():
        for index, piece in enumerate(names.pieces[name]):
            parts[piece_name(name, index)] = wanted[name].narrow(0, piece.start, piece.rows)
    return parts


def further_layers(names: FamilyNames, layers: int) -> list[str]:
    """Return the pattern of the names of layers after the last, which predict further tokens and are not trained."""
    if not names.prefix:
        return []
    own = "|".join(str(layer) for layer in range(layers))
    return [rf"{re.escape(names.prefix)}(?!(?:{own})\.)\d+\."]


def _with_pieces(name: str, names: FamilyNames) -> list[str]:
    """Return the names of the pieces of a tensor, or its own where it is in one."""
    return [piece_name(name, index) for index in range(len(names.pieces.get(name, ())))] or [name]


def _find_source(stored: Mapping[str, StoredTensor], name: str, pieces: Mapping[str, Piece]) -> TensorSource | None:
    if name in pieces:
        return _source_of_piece(stored, pieces[name])
    if name in stored:
        return TensorSource(stored[name])
    if (match := EXPERT_PATTERN.fullmatch(name)) is not None and not name.endswith(".bias"):
        layer, expert, kind = match[1], int(match[2]), match[3]
        fused = stored.get(f"{layer}.experts.{'down' if kind == 'down' else 'gate_up'}_proj")
        if fused is None or len(fused.shape) != 3 or expert >= fused.shape[0]:
            return None
        return TensorSource(fused, expert, {"gate": 0, "up": 1, "down": None}[kind])
    if (match := STACKED_PATTERN.fullmatch(name)) is not None:
        fused = stored.get(f"{match[1]}.experts.{match[3]}")
        if fused is not None and len(fused.shape) > 1 and int(match[2]) < fused.shape[0]:
            return TensorSource(fused, int(match[2]))
    return None


def _source_of_piece(stored: Mapping[str, StoredTensor], piece: Piece) -> TensorSource | None:
    if piece.name not in stored:
        return None
    tensor = stored[piece.name]
    if piece.row_in_file is not None and tensor.shape[:1] != (piece.rows_in_file,):
        return None
    return TensorSource(tensor, piece.expert, row=piece.row_in_file)


def _is_fused_of(name: str, experts: Mapping[str, LayerExperts]) -> bool:
    """Whether this is the name of the fused tensor of one of the layers."""
    match = FUSED_PATTERN.fullmatch(name)
    return match is not None and match[1] in experts


def _check_shapes(
    folder: Path, sources: Mapping[str, TensorSource], wanted: Mapping[str, Tensor], experts: Mapping[str, LayerExperts]
) -> None:
    misshapen, of_other_dtypes = [], []
    for name, source in sorted(sources.items()):
        stored = source.stored
        number = None if source.expert is None else experts[name.rpartition(".experts.")[0]].number
        if number is not None and stored.shape[0] != number:
            count = counted(number, "expert")
            misshapen.append(f"{stored.name} {list(stored.shape)} instead of {count}")
        elif source.shape != tuple(wanted[name].shape):
            misshapen.append(f"{name} {list(source.shape)} instead of {list(wanted[name].shape)}")
        dtypes = FLOAT_DTYPES if wanted[name].is_floating_point() else INTEGER_DTYPES
        if stored.dtype not in dtypes:
            of_other_dtypes.append(f"{name} {stored.dtype} instead of {listed(dtypes)}")
    if misshapen:
        raise WeightsError(
            f"{folder} holds tensors of another shape: {misshapen}; its config.json belongs to another model"
        )
    if of_other_dtypes:
        raise WeightsError(f"{folder} holds tensors of another dtype: {of_other_dtypes}; convert them first")


def read_sources(sources: Mapping[str, TensorSource]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of each source, file by file; files are opened once, one tensor is in memory at a time."""
    by_file: dict[Path, list[str]] = {}
    for name, source in sources.items():
        by_file.setdefault(source.stored.file, []).append(name)
    for path, names in sorted(by_file.items()):
        try:
            yield from _read_file(path, {name: sources[name] for name in names})
        except SafetensorError as error:
            raise WeightsError(f"{path} cannot be read ({reason_of(error)}); use another checkpoint") from None


def _read_file(path: Path, sources: Mapping[str, TensorSource]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name, source in sources.items():
            yield name, source.read(file)


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of each of `names` in the folder, in the stored dtype.

    Raises:
        WeightsError: One is missing.
    """
    stored, wanted = read_headers(folder), sorted(set(names))
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise WeightsError(f"{folder} lacks {missing}; use the folder of one complete checkpoint")
    return read_sources({name: TensorSource(stored[name]) for name in wanted})
