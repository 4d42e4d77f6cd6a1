"""A digest of the package's own files, by which hosts find out whether they run the same code. Imports no torch."""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
BYTECODE_SUFFIXES = (".pyc", ".pyo")


def source_digest(package: Path = PACKAGE) -> str:
    """Return the SHA-256, in hexadecimal, of the names and contents of a package's files.

    It is the same for a checkout, an editable install and a wheel of one commit: only what an installation contains
    is included, so no bytecode, no hidden files and no backups of editors.

    Args:
        package: The folder of the package.
    """
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(filter(_is_installed, names)):
        content = names[name].read_bytes()
        # The sizes separate the entries, so that no two sets of files give the same bytes.
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _is_installed(name: str) -> bool:
    parts = name.split("/")
    if "__pycache__" in parts or any(part.startswith(".") for part in parts):
        return False
    return not name.endswith((*BYTECODE_SUFFIXES, "~", ".orig", ".rej"))
