from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.harness.report import Report, Spread, Target, table


@pytest.mark.parametrize(
    ("measured", "relation", "met"),
    [(1.0, "<=", True), (1.1, "<=", False), (1.0, ">=", True), (0.9, ">=", False), (math.nan, ">=", False)],
)
def test_a_target_is_met_on_the_right_side_only(measured: float, relation: str, met: bool) -> None:
    assert Target("x", measured, "<=" if relation == "<=" else ">=", 1.0).met is met


def test_a_missed_target_fails_the_benchmark_and_is_written_down(tmp_path: Path) -> None:
    report = Report("tried", "Tried")
    report.expect("good", 2, ">=", 1)
    assert report.finish(tmp_path) == 0
    report.expect("bad", 2, "<=", 1, " s")
    assert report.finish(tmp_path) == 1
    document = json.loads((tmp_path / "tried.json").read_text())
    assert [target["met"] for target in document["targets"]] == [True, False]
    assert document["versions"]["python"]
    assert "MISSED" in (tmp_path / "tried.md").read_text()


def test_a_spread_tells_the_median_and_the_ends() -> None:
    assert Spread((3.0, 1.0, 2.0)).text(".1f", " s") == "2.0 s (1.0-3.0, n=3)"


def test_the_columns_of_a_table_are_aligned() -> None:
    assert table(["a", "long"], [["wide", "b"]]).splitlines() == [
        "| a    | long |",
        "| ---- | ---- |",
        "| wide | b    |",
    ]
