"""Code that ``exec`` runs in a namespace of its own, as notebooks and servers do: its functions may have no module."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch

import hyperopt

DOUBLE = torch.float64
CODE = {
    "a map": """
        def phi(w):
            return 0.5 * torch.tanh(w) + lam
        found = torch.autograd.grad(hyperopt.fixed_point(phi, start).value.sum(), lam)[0]
        """,
    "losses": """
        def inner(w, lam, batch):
            return (w - torch.tanh(w) / 2 - lam).square().sum()
        def outer(w, lam, batch):
            return w.sum()
        w = hyperopt.fixed_point(lambda w: 0.5 * torch.tanh(w) + lam, start).value.detach()
        problem = hyperopt.BilevelProblem(inner, outer)
        found = hyperopt.hypergradient(problem, w, lam.detach(), adjoint=hyperopt.Implicit(hyperopt.CG(1e-13))).grad
        """,
    "a Tuner": """
        model = torch.nn.Linear(1, 1, bias=False).double()
        hyper = hyperopt.Hyperparameters({"lam": hyperopt.Real(float(lam.detach()[0, 0]))}, dtype=torch.float64)
        def train_loss(model, batch, lam):
            w = model.weight
            return (w - torch.tanh(w) / 2 - lam["lam"]).square().sum()
        def val_loss(model, batch, lam):
            return model.weight.sum() * model.weight.numel()
        with torch.no_grad():
            model.weight.copy_(hyperopt.fixed_point(lambda w: 0.5 * torch.tanh(w) + lam[:1], start[:1]).value)
        tuner = hyperopt.Tuner(model, hyper, train_loss=train_loss, val_loss=val_loss,
                               optimizer=torch.optim.SGD(hyper.parameters(), lr=0.1))
        found = tuner.step(start, start).grad["lam"].expand(1, 1)
        """,
}


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("names", [{}, {"__name__": "__main__"}, {"__name__": None}], ids=["no name", "main", "None"])
def test_code_that_exec_runs(code: str, names: dict[str, Any]) -> None:
    """``w = tanh(w) / 2 + lam``, so that ``dw / dlam = 1 / (1 - (1 - tanh(w)^2) / 2)``."""
    lam = torch.tensor([[0.3], [-0.7]], dtype=DOUBLE, requires_grad=True)
    scope = {"torch": torch, "hyperopt": hyperopt, "lam": lam, "start": torch.zeros(2, 1, dtype=DOUBLE), **names}
    exec(textwrap.dedent(CODE[code]), scope)
    w = hyperopt.fixed_point(lambda w: 0.5 * torch.tanh(w) + lam.detach(), torch.zeros(2, 1, dtype=DOUBLE)).value
    exact = 1 / (1 - (1 - torch.tanh(w).square()) / 2)
    torch.testing.assert_close(scope["found"], exact[: len(scope["found"])], rtol=1e-5, atol=1e-8)
