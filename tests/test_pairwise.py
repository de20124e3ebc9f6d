"""The helper that thins cross products leaves out no pair."""

import itertools

import pytest

from pairwise import pairwise


def met(cases, a, b):
    return {(case[a], case[b]) for case in cases}


@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2), (6, 4, 2, 2, 3), (1, 5, 3), (4,) * 5])
def test_every_two_values_meet(sizes):
    dimensions = [range(size) for size in sizes]
    cases = pairwise(*dimensions)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert met(cases, a, b) == {*itertools.product(dimensions[a], dimensions[b])}
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(cases) <= 2 * first * second
    assert cases == pairwise(*dimensions) == sorted(set(cases))


def test_every_two_that_are_allowed():
    dimensions = "abc", "xyz", (0, 1)

    def allowed(one, two, three):
        return not (one == "a" and two != "x") and not (two == "y" and three)

    product = [case for case in itertools.product(*dimensions) if allowed(*case)]
    cases = pairwise(*dimensions, allowed=allowed)
    assert set(cases) < set(product)
    for a, b in itertools.combinations(range(3), 2):
        assert met(cases, a, b) == met(product, a, b)


def test_values_may_be_anything():
    assert pairwise([{}, None], [[1], [2]]) == [({}, [1]), ({}, [2]), (None, [1]), (None, [2])]
