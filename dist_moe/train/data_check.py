"""Looks at the text, the tokenizer and the weights that a configuration names; only a small text is read whole."""

import codecs
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dist_moe.config import Config, ConfigError, Violation
from dist_moe.config.pretrained import (
    PRETRAINED_KEY,
    is_model_folder,
    own_checkpoints,
    text_vocabulary,
    tokenizer_folder,
    weights_source,
)
from dist_moe.config.sections.data import BUILT_IN
from dist_moe.data.files import TO_JSONL, conversion
from dist_moe.data.labeled.sources import labeled_source_files, read_labeled
from dist_moe.data.sources import read_sources, refuse_shared_files, repeated_names, source_files
from dist_moe.errors import DataError, reason_of
from dist_moe.files import UNSEEN_REMEDY, why_unseen
from dist_moe.text import counted, listed

OPENED_FILES = 100
"""Of each source; of further files only the permissions are looked at."""
HEAD_BYTES = 4096
MAX_NAMED = 3
# The first bytes of other formats -> their suffix.
FORMATS = {
    **{b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"},
    **{b"PK\x03\x04": ".zip", b"PAR1": ".parquet"},
}
# A text up to this size is read whole and split, in a fraction of a second.
SPLIT_FILES, SPLIT_BYTES = 100, 4 << 20


def data_violations(config: Config) -> list[Violation]:
    """Return what is wrong with the files and folders that the configuration names, on this host."""
    found = _folder_violations(config)
    if config.task.kind != "language_model":
        return [*found, *_labeled_violations(config), *_tokenizer_violations(config), *_weights_violations(config)]
    in_sources = [violation for name in dict.fromkeys(config.data.sources) for violation in _source_violations(name)]
    if repeated := repeated_names(config.data.sources):
        rule = f"repeats {listed(repeated, last='and')}"
        in_sources.append(Violation("data.sources", config.data.sources, rule, "give each source once"))
    found += in_sources or _split_violations(config)
    return [*found, *_tokenizer_violations(config), *_weights_violations(config)]


def _folder_violations(config: Config) -> list[Violation]:
    found, run_dir, resume = [], Path(config.run.dir), config.checkpoint.resume
    if reason := why_unseen(run_dir / "checkpoints"):
        found.append(Violation("run.dir", str(run_dir), reason, UNSEEN_REMEDY))
    elif run_dir.is_symlink() and not run_dir.exists():
        rule = f"is a link to {os.readlink(run_dir)}, which does not exist"
        found.append(Violation("run.dir", str(run_dir), rule, "make that folder, or remove the link"))
    elif run_dir.exists() and not run_dir.is_dir():
        found.append(Violation("run.dir", str(run_dir), "is not a folder", "give the path of a folder"))
    elif rule := _why_not_writable(run_dir):
        found.append(Violation("run.dir", str(run_dir), rule, "give the path of a folder that this user may write"))
    on_hosts = config.cluster.hosts or config.cluster.hostfile  # a copy may be fetched from another host
    if resume not in ("auto", "never") and not on_hosts:
        if reason := why_unseen(Path(resume) / "config.yaml"):
            found.append(Violation("checkpoint.resume", resume, reason, UNSEEN_REMEDY))
        elif not Path(resume).is_dir():
            remedy = "give auto, never, or the path of a step-NNNNNN folder"
            found.append(Violation("checkpoint.resume", resume, "is not a folder", remedy))
    return found


def _why_not_writable(folder: Path) -> str:
    """Return why nothing can be written into a folder, which may not exist yet, or ""."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"is below {nearest}, which is not a folder"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"cannot be written: {nearest} is closed to this user"


def _source_violations(name: str) -> list[Violation]:
    try:
        files = [path for _, path in source_files(name) or []]
        faults = [fault for index, path in enumerate(files) if (fault := _fault(path, index < OPENED_FILES))]
        sizes = [path.stat().st_size for path in files]
    except DataError as error:
        return [Violation("data.sources", name, error.rule, error.remedy)]
    except OSError as error:
        rule = f"cannot be read ({reason_of(error)}: {error.filename or name})"
        return [Violation("data.sources", name, rule, "give files that this user can read")]
    if faults:
        reasons = listed((reason for reason, _ in faults), last="and", most=MAX_NAMED)
        return [Violation("data.sources", name, reasons, faults[0][1])]
    if files and not any(sizes):
        what = "is an empty file" if len(files) == 1 else f"matches {counted(len(files), 'file')}, all of them empty"
        return [Violation("data.sources", name, what, "give files with text")]
    return []


def _split_violations(config: Config) -> list[Violation]:
    """Return why the text as a whole cannot be divided; of a large or built-in one, only where sources share a file."""
    sources, fraction = config.data.sources, config.data.validation_fraction
    try:
        refuse_shared_files(sources)
        if _is_small(sources):
            from dist_moe.data.split import choose_split  # imports numpy and tokenizers

            choose_split(partial(read_sources, sources, Path()), fraction)
    except DataError as error:
        if error.value.startswith("data.validation_fraction="):
            return [Violation("data.validation_fraction", fraction, error.rule, error.remedy)]
        rule = f"cannot be used: {error.value.removeprefix('data.sources: ')} {error.rule}"
        return [Violation("data.sources", sources, rule, error.remedy)]
    return []


def _labeled_violations(config: Config) -> list[Violation]:
    """Return why the labeled sources cannot be used: local ones that are small are read whole."""
    sources = config.data.sources
    if repeated := repeated_names(sources):
        rule = f"repeats {listed(repeated, last='and')}"
        return [Violation("data.sources", sources, rule, "give each source once")]
    try:
        files = [labeled_source_files(name) for name in sources]
        paths = [path for each in files for _, path in each or ()]
        if None not in files and sum(path.stat().st_size for path in paths) <= SPLIT_BYTES:
            from dist_moe.data.labeled.prepare import class_names, divide, label_values  # imports numpy and tokenizers

            examples = [example for name in sources for example in read_labeled(name, Path())]
            splits = divide(examples, config.data.validation_fraction)
            labels = class_names(splits, config.task)
            label_values(examples, labels, config.task)
    except DataError as error:
        for key, value in (
            ("data.validation_fraction", config.data.validation_fraction),
            ("task.labels", config.task.labels),
        ):
            if error.value.startswith(f"{key}="):
                return [Violation(key, value, error.rule, error.remedy)]
        return [Violation("data.sources", sources, f"cannot be used: {error.value} {error.rule}", error.remedy)]
    except OSError as error:
        rule = f"cannot be read ({reason_of(error)}: {error.filename})"
        return [Violation("data.sources", sources, rule, "give files that this user can read")]
    return []


def _is_small(sources: Sequence[str]) -> bool:
    if any(name in BUILT_IN for name in sources):
        return False
    paths = [path for name in sources for _, path in source_files(name) or []]
    return len(paths) <= SPLIT_FILES and sum(path.stat().st_size for path in paths) <= SPLIT_BYTES


def _fault(path: Path, opened: bool) -> tuple[str, str] | None:
    """Return why a file cannot be used, to follow the name of the source, and what to do; None if nothing is seen."""
    if not os.access(path, os.R_OK):
        return f"has a file that this user may not read ({path})", "give it read permission, or leave it out"
    if not opened:
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"has a file that cannot be read ({path}: {reason_of(error)})", "restore it, or leave it out"
    for magic, suffix in FORMATS.items():
        if head.startswith(magic):
            return f"has a file that is not text ({path})", conversion(path.with_suffix(suffix))
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError as error:
        return f"has a file that is not UTF-8 ({path}: byte {error.start})", "convert the file to UTF-8"
    if path.suffix == ".jsonl" and text.strip() and not text.lstrip().startswith("{"):
        return f"has a file whose first line is no JSON object ({path})", TO_JSONL
    return None


def _tokenizer_violations(config: Config) -> list[Violation]:
    folder = tokenizer_folder(config)
    if folder is None or not os.path.isdir(folder):
        return []  # the rules of model.pretrained report it
    from dist_moe.data.token_folder import pretrained_tokenizer  # imports torch

    try:
        pretrained_tokenizer(folder, text_vocabulary(config), byte_level=config.task.kind == "language_model")
    except ConfigError:
        return []  # as above
    except DataError as error:
        return [Violation("data.tokenizer", "pretrained", f"cannot be used: {error.value} {error.rule}", error.remedy)]
    return []


def _weights_violations(config: Config) -> list[Violation]:
    source = weights_source(config.model)
    folder = source.folder
    if folder is None or not is_model_folder(folder) or any(own_checkpoints(config)):
        return []
    if any(folder.glob("*.safetensors")):
        return []
    remedy = "give a folder with the weights"
    if source.key == PRETRAINED_KEY:
        remedy += ", or model.config alone"
    elif any(folder.glob("*.bin")):
        remedy = "convert its *.bin, with save_pretrained of transformers"
    return [Violation(source.key, source.value, "has no weights (*.safetensors)", remedy)]
