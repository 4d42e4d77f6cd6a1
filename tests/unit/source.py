"""Our own source files, parsed: what they import, and how long and deep their functions are."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file; `path` is relative to the root of the tree."""

    path: Path

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def package(self) -> tuple[str, ...]:
        """The names of the package that the file is in."""
        return self.path.parent.parts

    @property
    def layer(self) -> str:
        """The part of the design it is in: `train` for dist_moe/train/step.py, `cli` for dist_moe/cli/main.py."""
        if self.package[0] != "dist_moe":
            return self.package[0]
        return self.package[1] if len(self.package) > 1 else self.path.stem

    def imports(self) -> set[str]:
        """Full names of everything imported, at the top or inside functions; `from a import b` is a.b."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) - node.level + 1] if node.level else ()
                prefix = ".".join((*base, *filter(None, [node.module])))
                found |= {f"{prefix}.{alias.name}" for alias in node.names}
        return found

    def functions(self) -> Iterator[Function]:
        """Every function and method, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


def sources(*folders: str) -> list[Source]:
    """Every Python file below the folders, not following links."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    linked = [path for path in paths if any(parent.is_symlink() for parent in path.parents)]
    return [Source(path.relative_to(ROOT)) for path in paths if path not in linked]


def depth(node: ast.AST) -> int:
    """How deep control flow nests below a node; `elif` counts as its `if`; functions inside start anew."""
    blocks = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, depth(child) + (isinstance(child, blocks) and not is_elif))
    return deepest
