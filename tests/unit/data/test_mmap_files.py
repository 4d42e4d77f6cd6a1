"""Detection of modified token files: by content when a run begins, by size and time before each step."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data import mmap_files, source_manifest
from dist_moe.data.corpus import TokenizedData, open_tokenized, prepare
from dist_moe.data.mmap_files import MmapFile, content_digest, detect_change, reject_change
from dist_moe.data.sources import fetch_sources
from dist_moe.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write 60 documents."""
    path = tmp_path / "works.jsonl"
    path.write_text("".join(json.dumps({"text": f"work {number} " * 9}) + "\n" for number in range(60)))
    return path


@pytest.fixture
def tokenized(source: Path, tmp_path: Path) -> TokenizedData:
    return tokenize(source, tmp_path)


def tokenize(source: Path, folder: Path) -> TokenizedData:
    return prepare([str(source)], "bytes", 0, 0.3, folder / "cache")


def flip(path: Path) -> None:
    """Flip one bit, and keep size and modification time."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "name", [f"{split}.{kind}" for split in ("train", "validation") for kind in ("tokens", "starts", "domains")]
)
def test_a_flipped_bit_is_detected_and_the_tokens_are_made_again(
    tokenized: TokenizedData, source: Path, name: str
) -> None:
    expected = np.array(tokenized.train.tokens)
    flip(tokenized.folder / name)
    with pytest.raises(DataError, match="damaged"):
        open_tokenized(tokenized.folder)
    again = tokenize(source, source.parent)
    assert again.fingerprint == tokenized.fingerprint
    np.testing.assert_array_equal(again.train.tokens, expected)
    open_tokenized(tokenized.folder)


def test_tokens_of_an_earlier_version_without_digests_are_used(tokenized: TokenizedData, source: Path) -> None:
    """A checkpoint that was trained on them can resume."""
    path = tokenized.folder / "manifest.json"
    before = json.loads(path.read_text())
    del before["digests"], before["files"][source_manifest.NAME]
    path.write_text(json.dumps(before))
    (tokenized.folder / source_manifest.NAME).unlink()
    inode = tokenized.folder.stat().st_ino
    again = tokenize(source, source.parent)
    assert (again.folder.stat().st_ino, again.fingerprint) == (inode, tokenized.fingerprint)


@pytest.mark.parametrize("place", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 4])
def test_a_digest_covers_every_block_and_the_size(tmp_path: Path, place: int) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(bytes((3 << 20) + 5))
    before = content_digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1")
    assert content_digest(path) != before
    path.write_bytes(bytes((3 << 20) + 6))
    assert content_digest(path) != before


def test_a_large_file_is_read_in_blocks_from_its_first_byte_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap_files, "WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(mmap_files, "BLOCK_BYTES", 1 << 10)
    path = tmp_path / "tokens"
    size = 2 << 20
    path.write_bytes(bytes(size))
    before = content_digest(path)
    found = [changes(path, place, before) for place in range(0, 40 << 10, 1 << 10)]
    assert found[0] and 0 < sum(found) < len(found), "some blocks, the first among them"
    assert changes(path, size - 1, before), "the last byte"


def changes(path: Path, place: int, before: str) -> bool:
    """Whether changing one byte changes the digest; the byte is restored."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\1", place)
        seen = content_digest(path) != before
        os.pwrite(file.fileno(), b"\0", place)
    return seen


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"xx")


def other(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\1")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("damage", "message"), [(shorter, "bytes instead of"), (longer, "bytes instead of"), (other, "was written to")]
)
def test_a_change_is_named(tokenized: TokenizedData, damage: Callable[[Path], None], message: str) -> None:
    assert detect_change(tokenized.files) == "" and len(tokenized.files) == 6
    reject_change("")
    path = tokenized.folder / "train.starts"
    damage(path)
    with pytest.raises(
        DataError, match=rf"{path} .*{message}.* while the run was reading it \(rank 0\); start the run"
    ):
        reject_change(detect_change(tokenized.files))


def test_a_file_that_was_removed_or_replaced_stays_mapped(tokenized: TokenizedData) -> None:
    """Its content is still mapped, so it is not a change."""
    path = tokenized.folder / "train.tokens"
    before = np.array(tokenized.train.tokens)
    path.rename(path.with_name("away"))
    path.write_bytes(b"other")
    path.with_name("away").unlink()
    assert detect_change(tokenized.files) == ""
    np.testing.assert_array_equal(tokenized.train.tokens, before)


def test_a_mapped_file_is_closed_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(4, dtype=np.int64).tobytes())
    before = len(os.listdir("/proc/self/fd"))
    file = MmapFile(path)
    array = file.array("int64")
    assert array.tolist() == [0, 1, 2, 3]
    del file, array
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_that_differs_is_described_by_its_files(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(f"text of {name} " * 20)

    def now() -> TokenizedData:
        return prepare([str(tmp_path / "*.txt")], "bytes", 0, 0.5, tmp_path / "cache")

    first = now()
    assert source_manifest.describe_changes(first.folder, now().folder) == ""
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("text of B " * 20)
    (tmp_path / "g.txt").write_text("text of g " * 20)
    changes = "a.txt was removed, b.txt was changed (200 bytes, now 200) and g.txt is new"
    assert source_manifest.describe_changes(first.folder, now().folder) == changes
    for name in "cd":
        (tmp_path / f"{name}.txt").write_text("short")
    assert source_manifest.describe_changes(first.folder, now().folder).endswith(
        "c.txt was changed (200 bytes, now 5) and 2 more"
    )
    assert source_manifest.describe_changes(tmp_path / "nowhere", first.folder) == ""


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    records = fetch_sources([str(source)], tmp_path)
    source_manifest.write_source_manifest(tmp_path, records)
    longer(source)
    with pytest.raises(DataError, match=r"works\.jsonl' was changed while it was read; start again"):
        source_manifest.write_source_manifest(tmp_path, records)
