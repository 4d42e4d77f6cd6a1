"""Reads and checks mutants.toml."""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

CATALOGUE = "tests/mutants/mutants.toml"


class CatalogueError(ValueError):
    """Entries that cannot be used, all of them at once, one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class Mutant:
    """One change: in `file`, the only `find` becomes `replace`, and the pytest node `test` must fail."""

    name: str
    trap: str
    file: str
    find: str
    replace: str
    test: str

    def apply(self, text: str) -> str:
        """The file's text with the change."""
        return text.replace(self.find, self.replace)

    def faults(self, root: Path) -> list[str]:
        """What keeps the entry from being used on the tree at `root`."""
        test_file, _, test_name = self.test.partition("::")
        function = test_name.rpartition("::")[2].partition("[")[0]
        found = []
        if not re.fullmatch(r"T\d{2,3}", self.trap):
            found.append(f"trap {self.trap!r} is not T and two or three digits")
        if not function.startswith(f"test_trap_{self.trap}_"):
            found.append(f"the test {function!r} must be named test_trap_{self.trap}_...")
        if not (root / test_file).is_file():
            found.append(f"no file {test_file}")
        elif not re.search(rf"^\s*def {re.escape(function)}\(", (root / test_file).read_text(), re.M):
            found.append(f"no test {function} in {test_file}")
        if not (root / self.file).is_file():
            found.append(f"no file {self.file}")
        elif (count := (root / self.file).read_text().count(self.find)) != 1:
            found.append(f"find = {self.find!r} occurs {count} times in {self.file}; it must occur exactly once")
        if self.find == self.replace:
            found.append("find and replace are equal; replace must change the code")
        return [f"mutant {self.name!r}: {fault}" for fault in found]


def read_catalogue(root: Path) -> list[Mutant]:
    """The mutants of the tree at `root`; raises CatalogueError naming every entry that cannot be used."""
    entries = tomllib.loads((root / CATALOGUE).read_text()).get("mutant", [])
    keys = {field.name for field in fields(Mutant)}
    wrong = [
        f"mutant {entry.get('name')!r} must have exactly the keys {sorted(keys)}"
        for entry in entries
        if set(entry) != keys
    ]
    if wrong:
        raise CatalogueError(wrong)
    mutants = [Mutant(**entry) for entry in entries]
    names = [mutant.name for mutant in mutants]
    wrong = [f"mutant {name!r} is listed more than once" for name in sorted(set(names)) if names.count(name) > 1]
    wrong += [fault for mutant in mutants for fault in mutant.faults(root)]
    if wrong:
        raise CatalogueError(wrong)
    return mutants
