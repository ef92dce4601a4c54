"""Marks of parametrized tests."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def sort_cases(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of a parametrized test by ``@pytest.mark.cases(quick=K, slow=M, among={"name": values, ...})``.

    Of the cases whose parameters have the values of ``among``, and that are not marked slow already, K stay quick; of all
    others, M are slow and the rest manual. Without a number it is all of them, and without ``among`` any values will do.
    They are chosen so that every value of every parameter occurs, and then as many pairs of values as possible.
    """
    functions: dict[Any, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("cases") is not None and hasattr(item, "callspec"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        wanted = cases[0].get_closest_marker("cases").kwargs
        among = wanted.get("among", {})
        quick = spread([case for case in cases if not _marked(case) and _has(case, among)], wanted.get("quick"))
        others = [case for case in cases if case not in quick and case.get_closest_marker("manual") is None]
        slow = spread(others, wanted.get("slow"))
        for case in others:
            case.add_marker(pytest.mark.slow if case in slow else pytest.mark.manual)


def _has(case: Any, among: dict[str, Any]) -> bool:
    return all(case.callspec.params[name] in values for name, values in among.items())


def _marked(case: pytest.Item) -> bool:
    return any(case.get_closest_marker(name) is not None for name in ("slow", "manual"))


def spread(cases: list[Any], count: int | None) -> list[Any]:
    """So many of the cases, with as many different pairs of values of their parameters as a greedy choice finds; None: all."""
    if count is None or count >= len(cases):
        return list(cases)
    seen, chosen = set[Any](), list[Any]()
    pairs = [_pairs(case.callspec.params) for case in cases]
    queue = [(-sum(new.values()), number) for number, new in enumerate(pairs)]  # what each would add at most, the most first
    heapq.heapify(queue)
    while len(chosen) < count:
        _, best = heapq.heappop(queue)
        adds = -sum(weight for pair, weight in pairs[best].items() if pair not in seen), best
        if queue and queue[0] < adds:  # what another would add was last counted when fewer pairs were chosen
            heapq.heappush(queue, adds)
        else:
            chosen.append(cases[best])
            seen.update(pairs[best])
    return chosen


def _pairs(params: dict[str, Any]) -> dict[Any, int]:
    """The values of a case, which weigh more, and their pairs; the cases of a test share the objects that are their values."""
    values = [(name, id(value)) for name, value in sorted(params.items())]
    return dict.fromkeys(itertools.combinations(values, 2), 1) | dict.fromkeys(values, 100)
