"""What is said of a solve that fails: where, how often, and in which words."""

import inspect
import logging
import warnings

import pytest
import torch

from hyperopt import Anderson, Implicit, Neumann, Picard, SolveWarning, Status, fixed_point
from hyperopt.core.policy import reset_warnings

pytestmark = pytest.mark.usefixtures("float64")


def solve(**methods):
    x = torch.ones(1, 2, requires_grad=True)
    return fixed_point(lambda w: 0.9 * torch.tanh(w) + x, torch.zeros(1, 2), **methods)


class Layer(torch.nn.Module):
    def forward(self, x):
        return fixed_point(lambda w: 0.9 * torch.tanh(w) + x, torch.zeros(1, 2), solver=Picard(1e-12, max_steps=2)).value


def here(offset=0):
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return __file__, frame.f_back.f_lineno + offset


def test_a_warning_points_at_the_callers_line():
    with pytest.warns(SolveWarning, match="inner solve: Picard") as caught:
        solve(solver=Picard(1e-12, max_steps=2))
    line = inspect.getsourcelines(solve)[1] + 2
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
    sol = solve(solver=Picard(1e-12, max_steps=500), adjoint=Implicit(Neumann(1e-12, max_steps=2)))
    with pytest.warns(SolveWarning, match="adjoint solve: Neumann") as caught:
        sol.value.sum().backward()
        where = here(-1)
    assert [(w.filename, w.lineno) for w in caught] == [where]
    reset_warnings()
    layer, x = Layer(), torch.ones(1, 2)
    with pytest.warns(SolveWarning, match="inner solve: Picard") as caught:
        layer(x)
    line = inspect.getsourcelines(Layer)[1] + 2
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


@pytest.mark.slow
def test_a_failure_that_repeats_is_said_again():
    said = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(1, 1001):
            solve(solver=Picard(1e-12, max_steps=2))
            if caught:
                said[k] = str(caught.pop().message)
            assert not caught
        reset_warnings()
        solve(solver=Picard(1e-12, max_steps=2))
    assert list(said) == [1, 10, 100, 1000]
    assert "time in this run" not in said[1] and said[1000].endswith("(the 1000th time in this run)")
    assert [str(w.message) for w in caught] == [said[1]]


def test_a_kind_of_failure_is_counted_by_itself(caplog):
    with caplog.at_level(logging.DEBUG, "hyperopt"):
        for _ in range(10):
            solve(solver=Picard(1e-12, max_steps=2), policy="fallback", fallback=[Anderson(1e-10)])
        solve(solver=Picard(0.5e-12, max_steps=2), policy="fallback", fallback=[Picard(1e-10, max_steps=500)])
    assert [record.levelname == "WARNING" for record in caplog.records] == [True, *[False] * 8, True, True]


@pytest.mark.parametrize("status", list(Status))
def test_a_message_speaks_of_arguments_and_not_of_keys(status):
    assert not [word for word in status.message.split() if "=" in word and word.strip("();,") not in ARGUMENTS]


ARGUMENTS = ("rows='joint'", "curvature='gauss_newton'", "rtol=0", "atol=0")
