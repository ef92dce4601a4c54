"""Marks of parametrized tests."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, all of them marked slow but the quick ones; a tuple has the values of several parameters."""
    return [value if value in quick else pytest.param(*_several(value), marks=pytest.mark.slow) for value in values]


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def sort_cases(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of a parametrized test by ``@pytest.mark.cases(quick=K, slow=M)``.

    Of those that are not marked slow already, K stay quick; of all others, M are slow and the rest manual. None: all of them.
    They are chosen so that every value of every parameter occurs, and then as many pairs of values as possible.
    """
    functions: dict[Any, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("cases") is not None and hasattr(item, "callspec"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        wanted = cases[0].get_closest_marker("cases").kwargs
        quick = spread([case for case in cases if not _marked(case)], wanted.get("quick"))
        others = [case for case in cases if case not in quick and case.get_closest_marker("manual") is None]
        slow = spread(others, wanted.get("slow"))
        for case in others:
            case.add_marker(pytest.mark.slow if case in slow else pytest.mark.manual)


def _marked(case: pytest.Item) -> bool:
    return any(case.get_closest_marker(name) is not None for name in ("slow", "manual"))


def spread(cases: list[Any], count: int | None) -> list[Any]:
    """So many of the cases, with as many different pairs of values of their parameters as a greedy choice finds; None: all."""
    left, seen, chosen = list(cases), set[Any](), list[Any]()
    if count is None or count >= len(cases):
        return left
    pairs = {id(case): _pairs(case.callspec.params) for case in left}
    while len(chosen) < count:
        best = max(left, key=lambda case: sum(weight for pair, weight in pairs[id(case)].items() if pair not in seen))
        chosen.append(best)
        left.remove(best)
        seen.update(pairs[id(best)])
    return chosen


def _pairs(params: dict[str, Any]) -> dict[Any, int]:
    """The values of a case, which weigh more, and their pairs; the cases of a test share the objects that are their values."""
    values = [(name, id(value)) for name, value in sorted(params.items())]
    return dict.fromkeys(itertools.combinations(values, 2), 1) | dict.fromkeys(values, 100)
