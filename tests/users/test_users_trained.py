"""What is trained is what is differentiated: weight decay of optimizers, tied tensors, statistics after training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hyperopt
from hyperopt import CG, Checkpointed, GradientDescent, Implicit, TorchOptimizer, Unrolled

D = torch.float64


def data(rows: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=draw, dtype=D)
    return x, torch.randn(rows, 1, generator=draw, dtype=D)


X, Y = data()
XV, YV = data(30, 1)
LAM = torch.ones(40, dtype=D)


def problem(penalty: float = 0.0) -> hyperopt.BilevelProblem:
    return hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * (X @ w - Y).square()).mean() + penalty / 2 * w.square().sum(),
        lambda w, lam, b: (XV @ w - YV).square().mean(),
    )


def run(
    problem: hyperopt.BilevelProblem, options: dict[str, Any], optimizer: str = "SGD", lam: torch.Tensor = LAM, **given: Any
) -> Any:
    inner = TorchOptimizer(optimizer=optimizer, lr=0.2, options=options, max_steps=1500)
    return hyperopt.hypergradient(
        problem, torch.zeros(4, 1, dtype=D), lam, inner=inner, **{"adjoint": Implicit(CG(1e-12)), **given}
    )


@pytest.mark.cases(quick=1, slow=3, among={"curvature": ["hessian"]})
@pytest.mark.parametrize("curvature", ["hessian", "finite_differences"])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.5}, {"weight_decay": 0.1, "momentum": 0.5}, {"weight_decay": 0.3, "nesterov": True, "momentum": 0.4}],
)
def test_decay_of_sgd_is_a_penalty(options, curvature):
    found = run(
        problem(), options, adjoint=Implicit(CG(1e-7 if curvature == "finite_differences" else 1e-12)), curvature=curvature
    )
    decay = options["weight_decay"]
    hessian = 2 * X.T @ X / 40 + decay * torch.eye(4, dtype=D)
    w = torch.linalg.solve(hessian, 2 * X.T @ Y / 40)
    torch.testing.assert_close(found.w, w, rtol=1e-6, atol=1e-9)
    u = torch.linalg.solve(hessian, 2 * XV.T @ (XV @ w - YV) / 30)
    torch.testing.assert_close(found.grad, -(2 * (X @ w - Y) * (X @ u) / 40).flatten(), rtol=1e-5, atol=1e-9)


@pytest.mark.cases(slow=1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "extra"),
    [
        ("Adam", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("RMSprop", "Adagrad", "NAdam")),
        pytest.param("Adam", {"amsgrad": True}, marks=pytest.mark.slow),
    ],
)
def test_decay_in_the_gradient_is_a_penalty_for_adaptive_optimizers_too(optimizer, extra):
    """The trained weights and the hypergradient are those of the penalised loss, step for step."""
    both = [
        run(problem(), {"weight_decay": 0.2, **extra}, optimizer),
        run(problem(0.2), extra, optimizer),
    ]
    torch.testing.assert_close(both[0].w, both[1].w, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(both[0].grad, both[1].grad, rtol=1e-6, atol=1e-9)
    plain = run(problem(), extra, optimizer)
    assert float((plain.grad - both[0].grad).norm()) > 0.05 * float(plain.grad.norm())


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        ("AdamW", {}, "weight_decay=0.01 shrinks the weights outside an adaptive step"),
        ("AdamW", {"weight_decay": 0.1}, "weight_decay=0.1"),
        ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, "weight_decay=0.1"),
        ("ASGD", {}, "lambd=0.0001"),
        ("SGD", {"maximize": True}, "maximize=True"),
        ("Adam", {"maximize": True}, "maximize=True"),
        ("Adafactor", {"weight_decay": 0.1}, "weight_decay=0.1"),
    ],
)
def test_what_is_the_gradient_of_no_loss_is_refused_by_name(optimizer, options, words):
    w = torch.zeros(4, 1, dtype=D)
    with pytest.raises(ValueError, match=f"TorchOptimizer: {optimizer} with {words}"):
        hyperopt.Bilevel(problem(), w, inner=TorchOptimizer(optimizer=optimizer, options=options)).step(LAM)
    assert not w.any()


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize(
    ("optimizer", "options"), [("AdamW", {"weight_decay": 0}), ("ASGD", {"lambd": 0}), ("RAdam", {}), ("Rprop", {})]
)
def test_without_it_they_are_welcome(optimizer, options):
    assert torch.isfinite(run(problem(0.1), options, optimizer).grad).all()


@pytest.mark.slow
def test_decay_beside_gauss_newton_products_and_declared_constants():
    loss = hyperopt.Composite(lambda w, lam, b: X @ w, lambda z, w, lam, b: (lam[:, None] * (z - Y).square()).mean())
    eigenvalues = torch.linalg.eigvalsh(2 * X.T @ X / 40)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    known = hyperopt.InnerConstants(0.99 * low, 1.01 * high, mixed_norm=10.0)
    outer = problem().outer_loss
    composite = hyperopt.BilevelProblem(loss, outer, constants=lambda w, lam: known)
    exact = run(problem(0.4), {}).grad
    found = run(composite, {"weight_decay": 0.4}, curvature="gauss_newton")
    torch.testing.assert_close(found.grad, exact, rtol=1e-6, atol=1e-9)
    assert found.certificate.is_bound and float((found.grad - exact).norm()) <= found.certificate.error


# ---- one variable


def tied_problem(tied: bool) -> hyperopt.BilevelProblem:
    def model(w: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = (w["a"], w["b"][0]) if tied else (w, w)
        return x @ one + torch.tanh(x @ two)

    return hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * (model(w, X) - Y).square()).mean() + 0.05 * (w["a"] if tied else w).square().sum(),
        lambda w, lam, b: (model(w, XV) - YV).square().mean(),
    )


WAYS = {
    "unrolled": {"inner": GradientDescent(step_size=0.05, max_steps=30), "adjoint": Unrolled()},
    "checkpointed": {"inner": GradientDescent(step_size=0.05, max_steps=30), "adjoint": Checkpointed()},
    "implicit": {"inner": hyperopt.InnerLBFGS(rtol=1e-10), "adjoint": Implicit(CG(1e-12))},
    "differences": {"inner": hyperopt.InnerLBFGS(rtol=1e-10), "adjoint": Implicit(CG(1e-7)), "curvature": "finite_differences"},
    "decay": {"inner": TorchOptimizer(optimizer="SGD", lr=0.05, max_steps=300, options={"weight_decay": 0.1})},
    "soba": {"adjoint": hyperopt.SOBA(step_size=0.01)},
}


@pytest.mark.cases(quick=4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alias", ["the same", "detached"])
def test_one_tensor_at_two_places_is_one_variable(way, alias):
    start = 0.1 * torch.ones(4, 1, dtype=D)
    twice = {"a": start.clone(), "b": (torch.zeros(()),)}
    twice["b"] = (twice["a"] if alias == "the same" else twice["a"].detach(),)
    got = hyperopt.hypergradient(tied_problem(True), twice, LAM, **WAYS[way])
    want = hyperopt.hypergradient(tied_problem(False), start, LAM, **WAYS[way])
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-10)
    assert set(got.w) == {"a", "b"} and got.loss == pytest.approx(want.loss)
    for leaf in (got.w["a"], got.w["b"][0]):
        torch.testing.assert_close(leaf, want.w)


def test_tied_weights_are_trained_in_place_and_come_back():
    w = {"a": torch.zeros(4, 1, dtype=D)}
    w["b"] = (w["a"],)  # pyright: ignore[reportArgumentType]
    bilevel = hyperopt.Bilevel(tied_problem(True), w, inner=hyperopt.InnerLBFGS())
    bilevel.step(LAM)
    assert w["a"].any() and bilevel.w["a"].data_ptr() == bilevel.w["b"][0].data_ptr() == w["a"].data_ptr()
    other = hyperopt.Bilevel(tied_problem(True), {"a": (t := torch.zeros(4, 1, dtype=D)), "b": (t,)}, inner=hyperopt.InnerLBFGS())
    other.load_state_dict(bilevel.state_dict())
    torch.testing.assert_close(other.w["b"][0], w["a"], rtol=0, atol=0)


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_a_module_that_ties_its_weights(remove_duplicate):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(4, 4, dtype=D), nn.Linear(4, 4, dtype=D)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(x)))

    def objective(lam: torch.Tensor) -> Any:
        net = Tied()
        w = {name: p.detach() for name, p in net.named_parameters(remove_duplicate=remove_duplicate)}

        def loss(w: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (torch.func.functional_call(net, w, (x,), tie_weights=remove_duplicate)[:, :1] - y).square()

        made = hyperopt.BilevelProblem(
            lambda w, lam, b: (lam[:, None] * loss(w, X, Y)).mean(), lambda w, lam, b: loss(w, XV, YV).mean()
        )
        return hyperopt.hypergradient(made, w, lam, inner=GradientDescent(step_size=0.1, max_steps=12), adjoint=Unrolled())

    d = torch.linspace(-1, 1, 40, dtype=D)
    want = (objective(LAM + 1e-5 * d).loss - objective(LAM - 1e-5 * d).loss) / 2e-5
    assert float(objective(LAM).grad @ d) == pytest.approx(want, rel=1e-6)


def test_parts_of_one_another_are_refused_and_parts_of_one_vector_are_welcome():
    flat = torch.zeros(8, dtype=D)
    with pytest.raises(ValueError, match=r"w\['a'\] and w\['b'\] share a part of their memory"):
        hyperopt.Bilevel(problem(), {"a": flat, "b": flat[:3]})
    with pytest.raises(ValueError, match="share a part of their memory"):
        hyperopt.hypergradient(problem(), {"a": flat[:5], "b": flat[3:]}, LAM)
    parts = {"a": flat[:4].view(4, 1), "b": (flat[4:].view(4, 1),)}
    two = hyperopt.hypergradient(tied_problem(True), parts, LAM, inner=GradientDescent(step_size=0.05, max_steps=5))
    assert not torch.equal(two.w["a"], two.w["b"][0])


# ---- statistics


METHODS = {"auto": "auto", "unrolled": Unrolled(), "checkpointed": Checkpointed(), "soba": hyperopt.SOBA(step_size=0.002)}


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("method", METHODS)
def test_a_normalised_network_may_be_evaluated_after_training(method):
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(100, 4)
    y = x.sum(1, keepdim=True)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = hyperopt.Functional(net)

    def loss(w: Any, lam: torch.Tensor, batch: Any) -> torch.Tensor:
        return (model(w, x) - y).square().mean() + lam * torch.stack([p.square().sum() for p in w.values()]).sum()

    inner = None if method == "soba" else GradientDescent(step_size=0.05, max_steps=100)
    bilevel = hyperopt.Bilevel(hyperopt.BilevelProblem(loss, loss), model.w, inner=inner, adjoint=METHODS[method])
    for _ in range(60 if inner is None else 3):
        bilevel.step(torch.tensor(1e-3))
    with torch.no_grad():
        evaluated, trained = float((net.eval()(x) - y).square().mean()), float((net.train()(x) - y).square().mean())
    assert evaluated < 1.2 * trained + 0.1
