"""The choice of the cases that a large parametrized test runs."""

from __future__ import annotations

from typing import Any

import pytest
from marks import spread

SOLVERS, ADJOINTS, MAPS = range(4), range(3), range(2)


@pytest.mark.cases(quick=6)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("name", MAPS)
def test_a_large_grid(solver: int, adjoint: int, name: int) -> None:
    """Stands for a large test, see below."""


@pytest.mark.cases(quick=2, slow=1, among={"solver": [2, 3], "name": [1]})
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MAPS)
def test_a_grid_of_which_some_values_are_quick(solver: int, name: int) -> None:
    """Stands for another, see below."""


def cases(request: pytest.FixtureRequest, name: str) -> list[Any]:
    found = [item for item in request.session.items if item.nodeid.partition("[")[0].endswith(f"::{name}")]
    return [case for case in found if case.get_closest_marker("slow") is None and case.get_closest_marker("manual") is None]


def test_only_named_values_are_quick(request: pytest.FixtureRequest) -> None:
    found = [case.callspec.params for case in cases(request, "test_a_grid_of_which_some_values_are_quick")]
    if not found:
        pytest.skip("run without the quick cases")
    assert sorted((each["solver"], each["name"]) for each in found) == [(2, 1), (3, 1)]


def test_every_value_occurs_and_many_pairs(request: pytest.FixtureRequest) -> None:
    found = cases(request, "test_a_large_grid")
    if not found:
        pytest.skip("run without the quick cases")

    def values(*names: str) -> set[Any]:
        return {tuple(case.callspec.params[name] for name in names) for case in found}

    assert len(values("solver")) == 4 and len(values("adjoint")) == 3 and len(values("name")) == 2
    assert len(values("solver", "adjoint")) == 6  # six different ones of twelve
    assert spread(found, None) == spread(found, 6) == found and len(found) == 6 and len(spread(found, 2)) == 2
