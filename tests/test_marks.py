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


def test_every_value_occurs_and_many_pairs(request: pytest.FixtureRequest) -> None:
    cases = [item for item in request.session.items if item.nodeid.partition("[")[0].endswith("::test_a_large_grid")]
    if len(cases) != 6:
        pytest.skip("run without the cases, or with those that are not quick")

    def values(*names: str) -> set[Any]:
        return {tuple(case.callspec.params[name] for name in names) for case in cases}  # pyright: ignore

    assert len(values("solver")) == 4 and len(values("adjoint")) == 3 and len(values("name")) == 2
    assert len(values("solver", "adjoint")) == 6  # six different ones of twelve
    assert spread(cases, None) == spread(cases, 6) == cases and len(spread(cases, 2)) == 2
