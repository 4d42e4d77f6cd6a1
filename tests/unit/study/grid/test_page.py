"""The tables of the pages of studies."""

from dist_moe.study.grid.page import Column, row
from dist_moe.study.grid.statistics import Results
from tests.unit.study.grid.results import result


def test_a_row_has_means_and_of_times_the_shortest() -> None:
    results = Results([result("a", 0, loss=1.0, wall_s=60.0), result("a", 1, loss=3.0, wall_s=400.0)])
    columns = [Column("loss", "loss", 2), Column("run, s", "wall_s", 0), Column("other", "other", 1)]
    assert row(results, "", "a", columns) == ["a", "2.00 ±1.41", "60", ""]
