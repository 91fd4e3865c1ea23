"""Groups of copies among examples."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.examples.copies import together, with_misled
from models.arrays import Floats


def distinct(n: int, dim: int = 64, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def names(n: int) -> list[str]:
    return [f"{row:04d}" for row in range(n)]


@pytest.mark.parametrize("n", [3, 40, 500, 3_000])
def test_distinct_inputs_stay_apart(n: int) -> None:
    found = together(distinct(n), names(n))
    assert found.near_copies == 0
    assert found.keys == tuple(names(n))


@pytest.mark.parametrize("n", [40, 500, 3_000])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_near_copies_are_one_group(n: int, noise: float) -> None:
    rows = distinct(n)
    half = n // 2
    rows[half : 2 * half] = rows[:half] + noise * distinct(half, seed=1)
    found = together(rows, names(n))
    assert found.near_copies == pytest.approx(half, abs=0.06 * half)
    same = [found.keys[row] == found.keys[row + half] for row in range(half)]
    assert np.mean(same) > 0.94


def test_several_copies_of_one_input_are_one_group() -> None:
    rows = distinct(60)
    rows[:8] = rows[0] + 0.1 * distinct(8, seed=1)
    found = together(rows, names(60))
    assert set(found.keys[:8]) == {"0000"}
    assert found.near_copies == 7


def test_equal_digests_and_groups_of_a_tenant_join() -> None:
    digests = [*names(6), "0000"]
    groups = ["", "one", "", "one", "two", "two", ""]
    found = together(distinct(7), digests, groups)
    assert found.keys == ("0000", "0001", "0002", "0001", "0004", "0004", "0000")
    assert found.near_copies == 0


def test_inputs_that_are_all_alike_are_one_group() -> None:
    assert set(together(np.ones((9, 8), np.float32), names(9)).keys) == {"0000"}


def test_a_correction_belongs_to_the_example_that_misled() -> None:
    rows = np.array([[0, 0], [1, 0], [10, 0], [0.9, 0], [0.1, 0]], dtype=np.float32)
    sampled = np.array([True, True, True, False, False])
    keys = ["a", "b", "c", "d", "e"]
    # The nearest with another label, not the nearest of all.
    assert with_misled(keys, rows, ["x", "y", "y", "y", "x"], sampled) == ["a", "b", "c", "a", "b"]
    # For numbers, the nearest value at least a standard deviation away.
    values = [0.0, 5.0, 5.1, 5.2, 0.1]
    assert with_misled(keys, rows, values, sampled) == ["a", "b", "c", "a", "b"]
    assert with_misled(keys, rows, ["x"] * 5, sampled) == ["a", "b", "c", "b", "a"]
    assert with_misled(keys, rows, values, np.ones(5, dtype=np.bool_)) == keys
    assert with_misled(keys, rows, values, np.zeros(5, dtype=np.bool_)) == keys
