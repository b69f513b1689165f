"""Of a table of families, methods and sizes the fast suite runs a few cells, and `make test-slow` the others.

A test that is marked `sampled` runs as many of its cases as it takes to show every value of each of its parameters;
one that is marked `sampled(2)` every pair of values, too. The rest is marked `slow`.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest

Case = Mapping[str, Hashable]


def covering(cases: Sequence[Case], strength: int = 1) -> list[int]:
    """Choose cases that together show every combination of `strength` values that any case shows, greedily.

    Args:
        cases: The value that each parameter has, by its name; all cases have the same parameters.
        strength: How many parameters a combination is of: 1 for each value, 2 for each pair.

    Returns:
        The indices of these cases.
    """
    shown = [set(combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    missing = set().union(*shown)
    used: Counter[tuple[str, Hashable]] = Counter()
    chosen = []
    while missing:
        new = [len(one & missing) for one in shown]
        rare = [-sum(used[value] for value in case.items()) for case in cases]
        # The one that shows most of what is missing; of equal ones that whose values are the rarest so far.
        best = max(range(len(cases)), key=list(zip(new, rare, strict=True)).__getitem__)
        chosen.append(best)
        missing -= shown[best]
        used.update(cases[best].items())
    return chosen


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of sampled tests that the fast suite leaves out."""
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for functions in tests.values():
        marker = functions[0].get_closest_marker("sampled")
        assert marker is not None
        chosen = covering([_case(function) for function in functions], *marker.args)
        for index in set(range(len(functions))) - set(chosen):
            functions[index].add_marker("slow")


def _case(function: pytest.Function) -> Case:
    """What a test's parameters are: equal texts and numbers are one value, and of other things each is its own."""
    plain = (str, int, float, type(None))
    return {name: value if isinstance(value, plain) else id(value) for name, value in function.callspec.params.items()}
