"""Files that were tokenized are known again under any name: by device and inode, and by their content."""

import os
import shutil
from pathlib import Path

import pytest

from dist_moe.data.corpus import prepare
from dist_moe.data.source_manifest import Overlap, compare_sources

TEXTS = ("a.txt", "b.txt", "c.txt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokenize three files by relative names, in the current folder -> the folder of the tokens."""
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in TEXTS:
        Path("texts", name).write_text(f"{name} has some words " * 50)
    return prepare(["texts/*.txt"], "bytes", 0, 0.3, tmp_path / "cache").folder


@pytest.mark.parametrize(
    "source", ["./texts/*.txt", "{here}/texts/*.txt", "texts/[abc].txt", "**/*.txt", "linked/*.txt"]
)
def test_the_same_files_under_another_spelling_are_held_out_as_before(folder: Path, source: str) -> None:
    Path("linked").mkdir()
    if source.startswith("linked"):
        for number, name in enumerate(TEXTS):
            Path("linked", f"{number}.txt").symlink_to(Path("texts", name).resolve())
    for recorded in (folder, Path("none")):
        assert compare_sources([source.format(here=Path.cwd())], ["texts/*.txt"], recorded) == (3, 3, ["texts/*.txt"])


def test_files_are_known_by_their_content_where_they_are_not_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, renamed = ("copied/*.txt",), ["renamed.txt"]
    shutil.copytree("texts", "copied")
    shutil.move("texts", "moved")
    shutil.copy("moved/b.txt", "renamed.txt")
    assert compare_sources(copied, ["texts/*.txt"], folder) == Overlap(3, 3, copied), "the names are the same"
    assert compare_sources(renamed, ["texts/*.txt"], folder) == Overlap(1, 1, None)
    assert compare_sources(renamed, ["texts/*.txt"], Path("none")) == Overlap(0, 1, None), "nothing is known"
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    moved = ["../moved/*.txt"]
    assert compare_sources(moved, ["texts/*.txt"], folder) == Overlap(3, 3, moved)


def test_other_and_more_files(folder: Path) -> None:
    Path("other.txt").write_text("a.txt has some worms " * 50)
    os.link("texts/a.txt", "hard.txt")
    assert compare_sources(["other.txt"], ["texts/*.txt"], folder) == Overlap(0, 1, None), "the size alone is equal"
    assert compare_sources(["hard.txt", "other.txt"], ["texts/*.txt"], folder) == Overlap(1, 2, None)
    assert compare_sources(["texts/a.txt"], ["texts/*.txt"], folder) == Overlap(1, 1, None)
    assert compare_sources(["texts/*.txt"], ["shakespeare"], folder.with_name("none")) == Overlap(0, 3, None)
    assert compare_sources(["shakespeare", "other.txt"], ["shakespeare"], folder) == Overlap(1, 2, None)
