"""What users ask of the trained problems beyond one loss with one penalty, against closed forms and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import hyperopt as ho

D: dict[str, Any] = {"dtype": torch.float64}
THROUGH = [ho.Unrolled(), ho.Checkpointed(), ho.Checkpointed(segment=1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **D)


def slope(run: Callable[[Any], ho.Estimate], lam: Any, h: float = 2e-4) -> tuple[float, float]:
    """The hypergradient along a random direction, and the difference of the whole training along it."""
    leaves, spec = optree.tree_flatten(lam)
    ways = [drawn(*x.shape, seed=100 + i) for i, x in enumerate(leaves)]

    def at(step: float) -> ho.Estimate:
        return run(optree.tree_unflatten(spec, [x + step * d for x, d in zip(leaves, ways, strict=True)]))

    found = sum(float((g * d).sum()) for g, d in zip(optree.tree_leaves(at(0.0).grad), ways, strict=True))
    one, two = ((at(s).loss - at(-s).loss) / (2 * s) for s in (h, h / 2))
    return found, (4 * two - one) / 3


def sine() -> tuple[Any, Callable[[Any, Any, Any], Tensor], Callable[[Any, Any, Any], Tensor]]:
    """A two-layer network's regression of a sine: its weights and both losses."""
    x, xv = 2 * drawn(12, 1, seed=1), 2 * drawn(12, 1, seed=2)
    w = {"a": drawn(1, 8, seed=3), "b": drawn(8, seed=4), "c": drawn(8, 1, seed=5) / 4, "d": torch.zeros((), **D)}

    def mean(w: Any, x: Tensor) -> Tensor:
        return (torch.tanh(x @ w["a"] + w["b"]) @ w["c"] + w["d"] - torch.sin(x + 0.3)).square().mean()

    return w, lambda w, lam, batch: mean(w, x), lambda w, lam, batch: mean(w, xv)


# ---- the start of training as a hyperparameter


@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_the_gradient_in_the_start_of_gradient_descent_is_its_closed_form(adjoint: Any) -> None:
    """``w_T - c = (1 - s)^T (w_0 - c)`` for the loss ``|w - c|^2 / 2``."""
    c, w0 = drawn(3), drawn(3, seed=1)
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (w - c).square().sum() / 2, lambda w, lam, batch: w.square().sum() / 2, initial=lambda lam: lam
    )
    found = ho.hypergradient(
        problem, torch.full((3,), 9.0, **D), w0, inner=ho.GradientDescent(step_size=0.1, max_steps=5), adjoint=adjoint
    )
    end = c + 0.9**5 * (w0 - c)
    assert torch.allclose(found.w, end, atol=1e-14)
    assert torch.allclose(found.grad, 0.9**5 * end, atol=1e-14)


@pytest.mark.parametrize(
    "inner",
    [
        ho.GradientDescent(step_size=0.1, max_steps=7),
        ho.HeavyBall(step_size=0.05, max_steps=7),
        ho.InnerAdam(lr=0.05, max_steps=7),
    ],
    ids=lambda inner: inner.name,
)
@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_the_gradient_in_the_start_of_a_network_is_that_of_its_whole_training(inner: Any, adjoint: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(inner_loss, outer_loss, initial=lambda lam: lam)
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint), w)
    assert found == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_a_start_that_is_computed_from_hyperparameters_which_the_losses_use_too(adjoint: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(
        lambda w, lam, batch: inner_loss(w, lam, batch) + lam["l2"] * w["a"].square().sum(),
        outer_loss,
        initial=lambda lam: {**w, "a": lam["scale"] * w["a"], "c": w["c"] + lam["l2"]},
    )
    lam = {"scale": torch.tensor(0.7, **D), "l2": torch.tensor(0.1, **D), "lr": torch.tensor(0.05, **D)}
    inner = ho.HeavyBall(step_size="lr", max_steps=6)
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint), lam)
    assert found == pytest.approx(wanted, rel=1e-7)


def test_meta_learned_start_over_tasks_lowers_the_loss_after_training() -> None:
    """MAML: one outer step is the sum of the tasks' gradients, and every training starts anew."""
    tasks = []
    for phase in (0.0, 0.5, 1.0):
        x = drawn(10, 1, seed=int(10 * phase))
        y = torch.sin(x + phase)

        def loss(w: Any, lam: Any, batch: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (torch.tanh(x @ w["a"]) @ w["b"] - y).square().mean()

        tasks.append(ho.BilevelProblem(loss, loss, initial=lambda lam: lam))
    lam = {"a": drawn(1, 6, seed=7).requires_grad_(), "b": drawn(6, 1, seed=8).requires_grad_()}
    with pytest.raises(ValueError, match=r"lam\['a'\] shares memory with w"):
        ho.Bilevel(tasks[0], lam, inner=ho.GradientDescent(), adjoint=ho.Unrolled()).step(lam)
    w = {name: torch.zeros_like(x) for name, x in lam.items()}
    runs = [ho.Bilevel(p, w, inner=ho.GradientDescent(step_size=0.1, max_steps=3), adjoint=ho.Unrolled()) for p in tasks]
    optimizer, losses = torch.optim.Adam(lam.values(), lr=0.1), []
    start = {name: x.detach().clone() for name, x in lam.items()}
    first = [run.step(lam).loss for run in runs]
    assert [run.step(lam).loss for run in runs] == first  # training starts anew, not where it ended
    assert all(torch.equal(lam[name], start[name]) for name in lam)  # and leaves the hyperparameters alone
    for _ in range(30):
        optimizer.zero_grad()
        found = [run.step(lam) for run in runs]
        for estimate in found:
            estimate.backward(lam)
        losses.append(sum(estimate.loss for estimate in found))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_an_implicit_gradient_in_the_start_is_zero_and_named() -> None:
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (w - lam["c"]).square().sum() / 2,
        lambda w, lam, batch: w.square().sum() / 2,
        initial=lambda lam: lam["w0"],
    )
    lam = {"c": drawn(3), "w0": drawn(3, seed=1)}
    found = ho.hypergradient(problem, torch.zeros(3, **D), lam, inner=ho.GradientDescent(step_size=0.5, max_steps=60))
    assert found.unused == ("lam['w0']",)
    assert torch.equal(found.grad["w0"], torch.zeros(3, **D))
    assert torch.allclose(found.grad["c"], lam["c"], atol=1e-12)


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        (lambda lam: lam["w0"][:2], r"initial\(lam\) has shape \(2,\), but in w it has \(3,\)"),
        (lambda lam: {"w": lam["w0"]}, "has the structure"),
        (lambda lam: lam["w0"].float(), "has dtype torch.float32"),
        (lambda lam: 0.0, "is a float"),
    ],
)
def test_a_start_that_is_not_like_w_is_refused(initial: Any, words: str) -> None:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return (w - lam["c"]).square().sum()

    problem, lam = ho.BilevelProblem(loss, loss, initial=initial), {"c": drawn(3), "w0": drawn(3)}
    with pytest.raises((TypeError, ValueError), match=words):
        ho.hypergradient(problem, torch.zeros(3, **D), lam, inner=ho.GradientDescent(), adjoint=ho.Unrolled())


def test_a_start_that_cannot_be_reached_is_refused() -> None:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return w.square().sum()

    problem, w = ho.BilevelProblem(loss, loss, initial=lambda lam: lam), drawn(3)
    with pytest.raises(ValueError, match=r"never reaches initial\(lam\)"):
        ho.hypergradient(problem, w, w, inner=ho.GradientDescent(max_steps=5), adjoint=ho.Unrolled(last=2))
    with pytest.raises(ValueError, match="no inner solver"):
        ho.hypergradient(problem, w, w)
    with pytest.raises(ValueError, match="no inner solver"):
        ho.Bilevel(problem, w, adjoint=ho.SOBA(step_size=0.1))


@pytest.mark.parametrize("adjoint", [ho.Unrolled(), ho.Checkpointed(), ho.Unrolled(last=4)], ids=repr)
def test_the_primitive_differentiates_an_iterate_in_its_start(adjoint: Any) -> None:
    w0, a = drawn(2, 3).requires_grad_(), torch.tensor(0.5, **D, requires_grad=True)
    solver = ho.Picard(rtol=0.0, atol=0.0, max_steps=4)
    value = ho.fixed_point(lambda w, a: a * torch.sin(w), w0, args=(a,), solver=solver, adjoint=adjoint).value
    want = w0
    for _ in range(4):
        want = a * torch.sin(want)
    for one, two in zip(torch.autograd.grad(value.sum(), (w0, a)), torch.autograd.grad(want.sum(), (w0, a)), strict=True):
        assert torch.allclose(one, two, atol=1e-14)
    for other in (ho.Implicit(), ho.Unrolled(last=2)):
        with pytest.raises(ValueError, match="w0 requires grad"):
            ho.fixed_point(lambda w, a: a * torch.sin(w), w0, args=(a,), solver=solver, adjoint=other)


# ---- a rate for each weight


LIKE_W = {
    "one": lambda w: torch.tensor(0.05, **D),
    "one in a vector": lambda w: torch.full((1,), 0.05, **D),
    "of each tensor": lambda w: {name: torch.tensor(0.02 * (i + 1), **D) for i, name in enumerate(w)},
    "of each weight": lambda w: {name: 0.02 + 0.05 * drawn(*x.shape, seed=9).abs() for name, x in w.items()},
    "of each column": lambda w: {name: 0.02 + 0.05 * drawn(*x.shape[-1:], seed=9).abs() for name, x in w.items()},
}


@pytest.mark.cases(quick=4, slow=30, among={"kind": list(LIKE_W)[::2]})
@pytest.mark.parametrize("kind", LIKE_W)
@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
@pytest.mark.parametrize(
    "inner",
    [
        ho.GradientDescent(step_size="rate", max_steps=6),
        ho.HeavyBall(step_size="rate", momentum=0.8, max_steps=6),
        ho.HeavyBall(step_size=0.05, momentum="rate", max_steps=6),
        ho.InnerAdam(lr="rate", max_steps=6),
    ],
    ids=["gradient descent", "heavy ball", "momentum", "adam"],
)
def test_the_gradient_in_rates_is_that_of_the_whole_training(kind: str, adjoint: Any, inner: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(inner_loss, outer_loss)
    lam = {"rate": LIKE_W[kind](w)}
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint), lam)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", LIKE_W)
@pytest.mark.parametrize(
    "inner",
    [
        ho.GradientDescent(step_size="rate", max_steps=6),
        ho.HeavyBall(step_size="rate", momentum="rate", max_steps=6),
        ho.InnerAdam(lr="rate", max_steps=6),
    ],
    ids=lambda inner: inner.name,
)
def test_training_in_place_takes_the_same_steps_as_unrolling(kind: str, inner: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(inner_loss, lambda w, lam, batch: outer_loss(w, lam, batch) + 0 * lam["used"])
    lam = {"rate": LIKE_W[kind](w), "used": torch.zeros((), **D)}
    ways = [ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint).w for adjoint in (*THROUGH, ho.T1T2())]
    for other in ways[1:]:
        for name in w:
            assert torch.allclose(ways[0][name], other[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_the_gradient_in_a_rate_for_each_weight_is_its_closed_form(adjoint: Any) -> None:
    """``w_T = (1 - r)^T w_0`` for the loss ``|w|^2 / 2``, entry by entry."""
    w0, rate = drawn(3), torch.tensor([0.1, 0.2, 0.3], **D)
    problem = ho.BilevelProblem(lambda w, lam, batch: w.square().sum() / 2, lambda w, lam, batch: w.square().sum() / 2)
    inner = ho.GradientDescent(step_size="rate", max_steps=4)
    found = ho.hypergradient(problem, w0, {"rate": rate}, inner=inner, adjoint=adjoint).grad["rate"]
    assert torch.allclose(found, -4 * (1 - rate) ** 7 * w0.square(), atol=1e-14)


def test_rates_of_another_precision_leave_that_of_the_weights() -> None:
    w, rate = torch.ones(3), torch.tensor([0.1, 0.2, 0.3], **D)
    problem = ho.BilevelProblem(lambda w, lam, batch: w.square().sum() / 2, lambda w, lam, batch: w.square().sum() / 2)
    found = ho.hypergradient(
        problem, w, {"rate": rate}, inner=ho.GradientDescent(step_size="rate", max_steps=2), adjoint=ho.Unrolled()
    )
    assert found.w.dtype == torch.float32 and found.grad["rate"].dtype == torch.float64
    assert torch.allclose(found.grad["rate"], -2 * (1 - rate) ** 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ({"a": torch.ones(2, 3)}, r"lam\['rate'\] has the structure .*'a'.*but w has .*'a'.*'b'"),
        ({"a": torch.ones(2, 3), "c": torch.ones(3)}, "has the structure"),
        ([torch.ones(2, 3), torch.ones(3)], "has the structure"),
        ({"a": torch.ones(3, 2), "b": torch.ones(3)}, r"shape \(3, 2\) does not broadcast to a weight of shape \(2, 3\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, r"shape \(2, 3\) does not broadcast to a weight of shape \(3,\)"),
        (torch.ones(2, 3), r"shape \(2, 3\) does not broadcast to a weight of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("inner", [ho.GradientDescent(step_size="rate"), ho.HeavyBall(momentum="rate"), ho.InnerAdam(lr="rate")])
@pytest.mark.parametrize("adjoint", [ho.Unrolled(), ho.Checkpointed(), ho.OneStep()], ids=repr)
def test_rates_that_do_not_fit_the_weights_are_refused(rate: Any, words: str, inner: Any, adjoint: Any) -> None:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return sum(x.square().sum() for x in w.values())  # pyright: ignore[reportReturnType]

    with pytest.raises(ValueError, match=words):
        ho.hypergradient(
            ho.BilevelProblem(loss, loss),
            {"a": torch.ones(2, 3), "b": torch.ones(3)},
            {"rate": rate},
            inner=inner,
            adjoint=adjoint,
        )


def test_the_step_of_the_map_is_the_smallest_rate_where_each_weight_has_its_own() -> None:
    """Neumann converges at that step: the hypergradient of a quadratic is its closed form."""
    H, g = torch.diag(torch.tensor([1.0, 4.0], **D)), torch.ones(2, **D)
    problem = ho.BilevelProblem(lambda w, lam, batch: w @ H @ w / 2 - lam["c"] @ w, lambda w, lam, batch: w @ g)
    lam = {"c": drawn(2), "rate": torch.tensor([1.5, 0.4], **D)}
    found = ho.hypergradient(
        problem,
        torch.zeros(2, **D),
        lam,
        inner=ho.GradientDescent(step_size="rate", max_steps=100),
        adjoint=ho.Implicit(ho.Neumann(rtol=1e-12, max_steps=500)),
    )
    assert torch.allclose(found.grad["c"], torch.tensor([1.0, 0.25], **D), atol=1e-9)
    assert found.unused == ("lam['rate']",)


# ---- hyperparameters of the outer loss alone, and of no loss


IMPLICIT = [
    ho.Implicit(ho.CG(rtol=1e-12)),
    ho.Implicit(ho.Neumann(rtol=1e-10, max_steps=2000)),
    ho.Implicit(ho.Dense()),
    ho.OneStep(),
    ho.T1T2(),
    ho.FiniteDifference(),
]
SINGLE = [ho.SOBA(step_size=0.01), ho.SABA(step_size=0.01), ho.StocBiO(step_size=0.01), ho.F2SA(step_size=0.01), ho.VPBGD()]


def regression(weight: str | None = None) -> tuple[ho.BilevelProblem, Tensor, Tensor]:
    """Ridge regression whose outer loss scales the prediction by ``lam["t"]``; ``weight`` names the penalty's hyperparameter."""
    x, y = drawn(20, 4), drawn(20, 1, seed=1)

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return (x @ w - y).square().mean() + (0.1 if weight is None else lam[weight]) * w.square().sum()

    return ho.BilevelProblem(inner, lambda w, lam, batch: (lam["t"] * (x @ w) - y.flip(0)).square().mean()), x, y


def direct(x: Tensor, y: Tensor, w: Tensor, t: float) -> float:
    return float((2 * (t * (x @ w) - y.flip(0)) * (x @ w)).mean())


@pytest.mark.parametrize("adjoint", [*IMPLICIT, *SINGLE], ids=lambda adjoint: type(adjoint).__name__)
def test_a_hyperparameter_of_the_outer_loss_alone_has_its_direct_gradient(adjoint: Any) -> None:
    problem, x, y = regression()
    w = drawn(4, 1, seed=2)
    run = ho.Bilevel(problem, w.clone(), adjoint=adjoint)
    found = run.step({"t": torch.tensor(0.7, **D)})
    at = w  # the single loops move on only after it; StocBiO and F2SA first, the latter a penalised copy of the weights
    if isinstance(adjoint, ho.StocBiO):
        at = found.w
    elif isinstance(adjoint, ho.F2SA):
        (at,) = run.state.memory["F2SA"]["penalised"]
    assert float(found.grad["t"]) == pytest.approx(direct(x, y, at, 0.7), rel=1e-10)


@pytest.mark.parametrize("adjoint", IMPLICIT, ids=lambda adjoint: type(adjoint).__name__)
def test_after_training_it_agrees_with_unrolling(adjoint: Any) -> None:
    problem, _, _ = regression()
    inner = ho.GradientDescent(step_size=0.1, max_steps=100)
    lam = {"t": torch.tensor(1.0, **D)}
    one, two = (ho.hypergradient(problem, torch.ones(4, 1, **D), lam, inner=inner, adjoint=a) for a in (adjoint, ho.Unrolled()))
    assert float(one.grad["t"]) == pytest.approx(float(two.grad["t"]), rel=1e-12)


@pytest.mark.parametrize("adjoint", [*IMPLICIT, *SINGLE[:3]], ids=lambda adjoint: type(adjoint).__name__)
def test_hyperparameters_that_no_loss_uses_are_zero_and_named(adjoint: Any) -> None:
    problem, _, _ = regression("l2")
    lam = {"t": torch.tensor(1.0, **D), "l2": torch.tensor(0.1, **D), "no": torch.ones(2, **D), "none": torch.tensor(1.0, **D)}
    found = ho.hypergradient(problem, drawn(4, 1), lam, adjoint=adjoint)
    assert found.unused == ("lam['no']", "lam['none']")
    assert torch.equal(found.grad["no"], torch.zeros(2, **D)) and float(found.grad["none"]) == 0
    assert float(found.grad["t"]) != 0


@pytest.mark.parametrize("adjoint", [*IMPLICIT, *SINGLE[:3]], ids=lambda adjoint: type(adjoint).__name__)
def test_a_call_that_could_not_do_anything_is_refused(adjoint: Any) -> None:
    problem, _, _ = regression()
    problem = ho.BilevelProblem(problem.inner_loss, problem.inner_loss)
    with pytest.raises(ValueError, match=r"does not depend on lam\['a'\], lam\['b'\].*Use lam in one of the losses"):
        ho.hypergradient(problem, drawn(4, 1), {"a": torch.tensor(1.0, **D), "b": torch.tensor(1.0, **D)}, adjoint=adjoint)


def test_both_kinds_of_hyperparameters_at_once_agree_with_finite_differences_of_the_training() -> None:
    problem, _, _ = regression("l2")
    lam = {"t": torch.tensor(0.8, **D), "l2": torch.tensor(0.2, **D)}
    inner = ho.InnerLBFGS(rtol=1e-12)
    found, wanted = slope(
        lambda lam: ho.hypergradient(problem, drawn(4, 1), lam, inner=inner, adjoint=ho.Implicit(ho.CG(rtol=1e-12))), lam
    )
    assert found == pytest.approx(wanted, rel=1e-6)


def test_an_outer_loss_of_hyperparameters_alone_has_its_direct_gradient() -> None:
    problem, _, _ = regression()
    problem = ho.BilevelProblem(problem.inner_loss, lambda w, lam, batch: lam.square().sum())
    found = ho.hypergradient(problem, drawn(4, 1), torch.tensor([1.0, 2.0], **D))
    assert torch.equal(found.grad, torch.tensor([2.0, 4.0], **D))


# ---- parameters that a loss does not use


@pytest.mark.parametrize("adjoint", [a for a in (*IMPLICIT, *THROUGH) if "Dense" not in repr(a)], ids=repr)
def test_parameters_that_no_loss_uses_change_nothing(adjoint: Any) -> None:
    problem, _, _ = regression("l2")
    lam = {"t": torch.tensor(0.8, **D), "l2": torch.tensor(0.2, **D)}
    more = ho.BilevelProblem(
        lambda w, lam, batch: problem.inner(w["used"], lam, batch), lambda w, lam, batch: problem.outer(w["used"], lam, batch)
    )
    inner, w = ho.HeavyBall(step_size=0.05, max_steps=40), drawn(4, 1)
    step = 0.05 if isinstance(adjoint, ho.OneStep) or "Neumann" in repr(adjoint) else None
    methods = {"inner": inner, "adjoint": adjoint, "step": step}
    one = ho.hypergradient(problem, w, lam, **methods)
    two = ho.hypergradient(more, {"first": drawn(3), "used": w, "zero": torch.ones((), **D)}, lam, **methods)
    for name in lam:
        assert float(two.grad[name]) == pytest.approx(float(one.grad[name]), rel=1e-9)
    assert torch.equal(two.w["first"], drawn(3)) and float(two.w["zero"]) == 1


def test_parameters_of_one_of_the_losses_alone() -> None:
    """Of the inner loss alone: right. Of the outer alone: nothing trains it, which is refused."""
    x, y = drawn(20, 4), drawn(20, 1, seed=1)

    def fit(w: Any, lam: Any, batch: Any) -> Tensor:
        return (x @ w["a"] + w["b"] - y).square().mean() + lam * w["a"].square().sum()

    lam, w = torch.tensor(0.2, **D), {"a": torch.zeros(4, 1, **D), "b": torch.zeros(1, **D)}
    problem = ho.BilevelProblem(fit, lambda w, lam, batch: w["a"].square().sum())
    tight = ho.Implicit(ho.CG(rtol=1e-12))
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=ho.InnerLBFGS(rtol=1e-12), adjoint=tight), lam)
    assert found == pytest.approx(wanted, rel=1e-6)
    problem = ho.BilevelProblem(lambda w, lam, batch: (x @ w["a"] - y).square().mean() + lam * w["a"].square().sum(), fit)
    with pytest.raises(ValueError, match=r"w\['b'\], but the inner loss does not"):
        ho.hypergradient(problem, w, lam, adjoint=tight)
