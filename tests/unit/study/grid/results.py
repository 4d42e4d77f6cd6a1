"""Results of studies for the tests."""

from dist_moe.study.grid.statistics import Results
from dist_moe.study.grid.store import CellResult


def result(arm: str, seed: int, case: str = "", **values: float | None) -> CellResult:
    """Make the result of a cell."""
    return with_values(arm, seed, case, values)


def with_values(arm: str, seed: int, case: str, values: dict[str, float | None]) -> CellResult:
    """Make the result of a cell of measures by name."""
    return CellResult(case, arm, seed, digest=f"{case}-{arm}-{seed}", values=values)


def two_arms(first: list[float], second: list[float], name: str = "loss") -> Results:
    """Make results of the arms `a` and `b` with seeds 0, 1, .. and one measure."""
    found = [with_values("a", seed, "", {name: value}) for seed, value in enumerate(first)]
    return Results(found + [with_values("b", seed, "", {name: value}) for seed, value in enumerate(second)])
