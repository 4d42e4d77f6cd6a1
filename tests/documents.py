"""The Markdown files of the repository, parsed: fenced blocks with their marks, the commands in them, and links.

A block of commands has the language `sh` and, on the line above its fence, one of two marks:

    <!-- run -->                           a test runs it, shortened, in a temporary working folder
    <!-- not run: needs two GPUs -->       only its commands are parsed; the reason is required
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^`\n]*$")
MARK = re.compile(r"^ *<!-- (?:(?P<run>run)|not run: (?P<reason>[^\s].*)) -->$")
OPERATORS = re.compile(r"[();<>|&]+")
LINK = re.compile(r"\]\((?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        path: The file, relative to the root of the repository.
        line: The line of the opening fence, from 1.
        language: The first word after the fence, or "".
        run: Whether it is marked as run by a test.
        reason: Why it is not run; "" without that mark.
        text: The lines between the fences, without their common indent.
    """

    path: Path
    line: int
    language: str
    run: bool
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each simple command; of a transcript, those after a `$` prompt."""
        text = self.text
        if self.language != "sh":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        return [command for line in text.replace("\\\n", " ").splitlines() for command in simple_commands(line)]


def markdown_files() -> list[Path]:
    """Every Markdown file that a reader is shown."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found += sorted((ROOT / "launch").glob("**/*.md")) + sorted((ROOT / "examples").glob("**/*.md"))
    return [path.relative_to(ROOT) for path in found if path.is_file()]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of one file, in order.

    Args:
        path: Relative to the root of the repository.

    Raises:
        ValueError: A fence is not closed.
    """
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if opened is None:
            opened = number, fence
            continue
        first, start = opened
        mark = MARK.match(lines[first - 2]) if first > 1 else None
        body = [inner.removeprefix(start["indent"]) for inner in lines[first : number - 1]]
        run, reason = (bool(mark["run"]), mark["reason"] or "") if mark else (False, "")
        yield Block(path, first, start["language"], run, reason, "\n".join(body))
        opened = None
    if opened is not None:
        raise ValueError(f"{path}:{opened[0]}: the fence is not closed")


def all_blocks() -> list[Block]:
    """The fenced blocks of every Markdown file."""
    return [block for path in markdown_files() for block in blocks(path)]


def simple_commands(line: str) -> list[list[str]]:
    """The commands of one line of shell, each as its words: comments, operators and redirections are cut off."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if OPERATORS.fullmatch(word):
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


def arguments_of_dist_moe(command: list[str]) -> list[str] | None:
    """What a command hands to `dist-moe`, by its name, as a module, or in its image; None where it does not run it."""
    if command[0] in ("pip", "pip3", "which", "cd"):
        return None
    for number, word in enumerate(command):
        by_name = word.rpartition("/")[2] == "dist-moe"
        as_module = word == "dist_moe" and number > 0 and command[number - 1] in ("-m", "--module")
        in_image = word.startswith("dist-moe:") and "run" in command[:number] and "--entrypoint" not in command
        if by_name or as_module or in_image:
            return command[number + 1 :]
    return None


def links(path: Path) -> Iterator[tuple[str, str]]:
    """The links of a file to others of the repository: the target, "" for the file itself, and the anchor or ""."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.finditer(text):
        if "://" not in link["target"] and not link["target"].startswith("mailto:"):
            yield link["target"], link["anchor"] or ""


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
