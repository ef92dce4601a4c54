"""Users' own code: modules whose parameters are replaced, data that are not finite, saddles, and sparse tensors of weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt as ho

D: dict[str, Any] = {"dtype": torch.float64}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **D)


X, Y = drawn(20, 3), drawn(20, 1, seed=1)


def of_module(module: nn.Module) -> tuple[Any, ho.BilevelProblem]:
    """A module as a function, with a ridge problem of it."""
    f = ho.Functional(module)

    def inner(w: Any, lam: Tensor, batch: Any) -> Tensor:
        return (f(w, X) - Y).square().mean() + lam * sum(p.square().sum() for p in w.values())

    return f, ho.BilevelProblem(inner, lambda w, lam, batch: (f(w, X.flip(0)) - Y).square().mean())


def load(module: nn.Linear) -> None:
    module.load_state_dict({name: torch.full_like(p, 5.0) for name, p in module.state_dict().items()}, assign=True)


def replace(module: nn.Linear) -> None:
    module.weight = nn.Parameter(torch.full_like(module.weight, 5.0))


def cast(module: nn.Linear) -> None:
    module.float()


def point(module: nn.Linear) -> None:
    module.weight.data = torch.zeros_like(module.weight)


def parametrize(module: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(module)


@pytest.mark.parametrize("change", [load, replace, cast, point, parametrize])
def test_a_module_whose_parameters_are_others_now_is_refused(change: Callable[[nn.Linear], None]) -> None:
    """Training would go on in the old memory, and never reach the module."""
    module = nn.Linear(3, 1, **D)
    f, problem = of_module(module)
    bilevel = ho.Bilevel(problem, f.w, inner=ho.InnerLBFGS())
    bilevel.step(torch.tensor(0.1, **D))
    assert torch.equal(module.weight, bilevel.w["weight"])
    change(module)
    with pytest.raises(ValueError, match=r"parameter weight of .* replaced or moved"):
        bilevel.step(torch.tensor(0.1, **D))


def test_values_that_are_written_in_place_are_taken() -> None:
    module = nn.Linear(3, 1, **D)
    f, _ = of_module(module)
    module.load_state_dict({name: torch.full_like(p, 5.0) for name, p in module.state_dict().items()})
    assert torch.equal(f(f.w, X), module(X)) and float(f.w["weight"][0, 0]) == 5.0


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved, copy.copy])
def test_a_copy_of_a_function_trains_its_own_module(duplicate: Callable[[Any], Any]) -> None:
    other = duplicate(ho.Functional(nn.Linear(3, 1, **D)))
    other.w["weight"].fill_(2.0)
    assert float(other.module.weight.detach()[0, 0]) == 2.0


ADJOINTS = [ho.OneStep(), ho.T1T2(), ho.FiniteDifference(), ho.Implicit(ho.CG(), policy="ignore"), "auto"]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: a if isinstance(a, str) else type(a).__name__)
def test_data_that_are_not_finite_give_no_finite_hypergradient(adjoint: Any) -> None:
    """One step needs no products, so it would not meet the NaN of another row."""
    data = X.clone()
    data[0, 0] = torch.nan
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (lam[:, None] * (data @ w - Y).square()).mean(), lambda w, lam, batch: (X @ w - Y).square().mean()
    )
    lam = torch.ones(20, **D, requires_grad=True)
    estimate = ho.hypergradient(problem, torch.ones(3, 1, **D), lam, adjoint=adjoint)
    assert estimate.status == ho.Status.nonfinite and bool(estimate.grad.isnan().all())
    with pytest.raises(ho.SolveError, match="gradient of the inner loss is not finite"):
        estimate.backward(lam)


@pytest.mark.usefixtures("float64")  # whose notes are said anew
def test_at_a_saddle_without_curvature_along_the_gradient_the_system_is_solved(caplog: pytest.LogCaptureFixture) -> None:
    """With ``H = diag(1, -1)`` and both gradients ``(1, 1)``, the hypergradient is 0; one term of the series would give -2."""
    problem = ho.BilevelProblem(lambda w, lam, batch: (w[0] ** 2 - w[1] ** 2) / 2 + lam * w.sum(), lambda w, lam, batch: w.sum())
    estimate = ho.hypergradient(problem, torch.zeros(2, **D), torch.zeros((), **D))
    assert abs(float(estimate.grad)) < 1e-12 and estimate.choice is not None and estimate.choice.name == "MINRES"
    assert "saddle" in estimate.note and "saddle" in caplog.text


INDEX = torch.tensor([[0, 1], [1, 0]])


def coo(values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(INDEX, values, (2, 2))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "product",
    [lambda v, x: coo(v) @ x, lambda v, x: torch.sparse.mm(coo(v), x), lambda v, x: coo(v).to_dense() @ x],
)
def test_a_sparse_tensor_of_weights_is_refused_and_one_of_data_or_hyperparameters_is_right(product: Any) -> None:
    """The second derivative of PyTorch leaves a part out; where the values are not weights, none of it is needed."""
    target = drawn(2, 2, seed=3)

    def inner(w: Tensor, lam: Tensor, batch: Any) -> Tensor:
        return (product(w[:2] ** 3, w.reshape(2, 2)) - target).square().sum() + lam * w.square().sum()

    problem = ho.BilevelProblem(inner, lambda w, lam, batch: w.sum())
    with pytest.raises(RuntimeError, match="sparse_coo_tensor"):
        ho.hypergradient(problem, drawn(4, seed=4), torch.ones((), **D), adjoint=ho.Implicit(ho.MINRES()))

    def of_lam(w: Tensor, lam: Tensor, batch: Any) -> Tensor:
        return (product(lam, w.reshape(2, 2)) - target).square().sum() + w.square().sum()

    def dense(w: Tensor, lam: Tensor, batch: Any) -> Tensor:
        return (torch.zeros(2, 2, **D).index_put(tuple(INDEX), lam) @ w.reshape(2, 2) - target).square().sum() + w.square().sum()

    found = [
        ho.hypergradient(ho.BilevelProblem(loss, lambda w, lam, batch: w.sum()), drawn(4, seed=4), drawn(2, seed=5)).grad
        for loss in (of_lam, dense)
    ]
    assert torch.allclose(*found, rtol=1e-10)


@pytest.mark.parametrize("inner", [None, ho.GradientDescent(step_size=0.1, max_steps=3), ho.TorchOptimizer(lr=0.1, max_steps=3)])
def test_an_embedding_with_sparse_gradients_has_the_hypergradient_of_a_dense_one(inner: Any) -> None:
    words, target = torch.tensor([0, 1, 2, 3, 4, 0, 1]), drawn(7, 2)

    def found(sparse: bool) -> Tensor:
        f = ho.Functional(nn.Embedding(5, 2, sparse=sparse, _weight=drawn(5, 2, seed=1)))
        problem = ho.BilevelProblem(
            lambda w, lam, batch: (f(w, words) ** 2 - target).square().mean() + lam * w["weight"].square().sum(),
            lambda w, lam, batch: f(w, words).square().sum(),
        )
        return ho.hypergradient(problem, f.w, torch.tensor(3.0, **D), inner=inner).grad

    assert torch.allclose(found(True), found(False), rtol=1e-10)


def test_an_embedding_with_sparse_gradients_in_a_training_loop() -> None:
    words, target = torch.tensor([0, 1, 2, 3, 4, 0, 1]), drawn(7, 1)

    def found(sparse: bool) -> Tensor:
        model, hyper = nn.Embedding(5, 1, sparse=sparse, _weight=drawn(5, 1, seed=1)), ho.Hyperparameters({"l": ho.Positive(0.3)})
        tuner = ho.Tuner(
            model,
            hyper,
            train_loss=lambda m, b, lam: (m(b[0]) - b[1]).square().mean() + lam["l"] * m.weight.square().sum(),
            val_loss=lambda m, b, lam: (m(b[0]) - b[1]).square().mean(),
            optimizer=torch.optim.SGD(hyper.parameters(), lr=0.1),
        )
        return tuner.step((words, target), (words, target.flip(0))).grad["l"]

    assert torch.allclose(found(True), found(False), rtol=1e-6)


def test_tensors_without_numbers_are_named() -> None:
    problem = ho.BilevelProblem(lambda w, lam, batch: (w - lam).square().sum(), lambda w, lam, batch: w.sum())
    for w, lam, name in (
        (torch.zeros(2, device="meta"), torch.zeros(2), "w"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "lam"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is on the meta device"):
            ho.hypergradient(problem, w, lam, inner=ho.InnerLBFGS())


def test_a_module_in_data_parallel_is_named_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"DataParallel.*\.module"):
        ho.Functional(nn.DataParallel(nn.Linear(3, 1)))
