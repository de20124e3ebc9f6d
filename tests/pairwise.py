"""Part of a cross product in which every two values of different dimensions still meet.

    pairwise(POSITIONS, COMPRESSORS, DTYPES)    instead of    itertools.product(...)

For dimensions that a test covers in order to see that each value works with each other one, where
the meeting of three of them is of no interest or is tested elsewhere.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any


def pairwise(
    *dimensions: Iterable[Any], allowed: Callable[..., bool] = lambda *case: True
) -> list[tuple[Any, ...]]:
    """Cases of the product, the same ones every time and in its order.

    Every two values that meet in any case of the product, of those that are `allowed`, meet in one
    of the cases returned.
    """
    values = [list(dimension) for dimension in dimensions]
    product = itertools.product(*(range(len(dimension)) for dimension in values))
    cases = [
        case
        for case in product
        if allowed(*(dimension[i] for dimension, i in zip(values, case, strict=True)))
    ]
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(cases, key=lambda case: len(pairs[case] & left))
        left -= pairs[best]
        chosen.append(best)
    return [
        tuple(dimension[i] for dimension, i in zip(values, case, strict=True))
        for case in sorted(chosen)
    ]
