"""Nothing is silent: what reaches nothing, fits nothing, has no use or is not finite is refused, before anything changes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from bilevel_problems import DOUBLE, Ridge

import hyperopt
from hyperopt import (
    CG,
    F2SA,
    SABA,
    SOBA,
    VPBGD,
    Anderson,
    Bilevel,
    BilevelProblem,
    Checkpointed,
    FiniteDifference,
    GradientDescent,
    HeavyBall,
    Hyperparameters,
    Implicit,
    InnerAdam,
    InnerLBFGS,
    Minibatches,
    Neumann,
    OneStep,
    Picard,
    Positive,
    ProductSettings,
    Real,
    SolveError,
    Status,
    StocBiO,
    TorchOptimizer,
    Unrolled,
    fixed_point,
    stn,
)

np: Any = numpy  # to a type checker, its numbers are neither int nor float
FOLLOWING = BilevelProblem(lambda w, lam, b: (w - lam["a"]).square().sum() / 2, lambda w, lam, b: (w - 3).square().sum() / 2)
GD = GradientDescent(step_size=0.1, max_steps=5)


def linear_problem(shift: float = 0.0) -> BilevelProblem:
    """``dE/da = a - 3 + shift``, at ``w = a``."""
    return BilevelProblem(
        lambda w, lam, b: (w - lam["a"]).square().sum() / 2, lambda w, lam, b: (w - 3 + shift).square().sum() / 2
    )


# ---- backward


def test_backward_into_nothing():
    hyper = Hyperparameters({"a": Real(1.0)})
    estimate = hyperopt.hypergradient(FOLLOWING, torch.ones(1), hyper.read())
    with pytest.raises(ValueError, match=r"no tensor in lam requires grad.*read\(\) has no graph"):
        estimate.backward(hyper.read())
    estimate.backward(hyper.values())
    assert float(hyper.raw["a"].grad) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ({"b": torch.ones((), requires_grad=True)}, "was taken at"),
        ([torch.ones((), requires_grad=True)], "was taken at"),
        ({"a": torch.ones(2, requires_grad=True)}, r"lam\['a'\] has shape \(2,\), but its hypergradient has shape \(\)"),
        ({"a": 1.0}, r"lam\['a'\] is a float"),
        ({"a": torch.ones(()), "b": torch.ones((), requires_grad=True)}, "was taken at"),
    ],
)
def test_backward_of_another_lam(lam, message):
    estimate = hyperopt.hypergradient(FOLLOWING, torch.ones(1), {"a": torch.ones(())})
    with pytest.raises(ValueError, match=message):
        estimate.backward(lam)


def test_backward_where_only_some_require_grad():
    problem = BilevelProblem(
        lambda w, lam, b: (w - lam["a"] - lam["b"]).square().sum(), lambda w, lam, b: (w - 3).square().sum() / 2
    )
    lam = {"a": torch.ones((), dtype=DOUBLE, requires_grad=True), "b": torch.ones((), dtype=DOUBLE)}
    hyperopt.hypergradient(problem, 2 * torch.ones(1, dtype=DOUBLE), lam).backward(lam)
    assert lam["b"].grad is None and lam["a"].grad is not None and float(lam["a"].grad) == pytest.approx(-1.0)


def test_accumulate_over_tasks():
    """The sum of three hypergradients before one step, against the closed form; the way from raw to lam survives."""
    hyper = Hyperparameters({"a": Positive(2.0)}, dtype=DOUBLE)
    lam = hyper.values()
    for shift in (0.0, 0.5, -2.0):
        hyperopt.hypergradient(linear_problem(shift), torch.full((1,), 2.0, dtype=DOUBLE), lam).backward(lam)
    assert float(hyper.raw["a"].grad) == pytest.approx(2.0 * sum(2 - 3 + shift for shift in (0.0, 0.5, -2.0)))
    # Leaves themselves, and one graph for two leaves.
    leaf = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    both = {"a": leaf}
    for _ in range(2):
        hyperopt.hypergradient(linear_problem(), torch.full((1,), 2.0, dtype=DOUBLE), both).backward(both)
    assert leaf.grad is not None and float(leaf.grad) == pytest.approx(-2.0)


def test_the_way_to_lam_goes_with_lam():
    import gc
    import weakref

    hyper = Hyperparameters({"a": Positive(2.0)}, dtype=DOUBLE)
    lam = hyper.values()
    estimate = hyperopt.hypergradient(FOLLOWING, torch.ones(1, dtype=DOUBLE), lam)
    estimate.backward(lam)
    gone = weakref.ref(lam["a"])
    del lam
    gc.collect()
    assert gone() is None and bool(estimate.grad["a"].isfinite())


# ---- a gradient that is not finite


def test_a_gradient_that_is_not_finite_is_not_handed_on():
    hyper = Hyperparameters({"a": Real(0.0), "b": Real(1.0)})
    lam = hyper.values()
    problem = BilevelProblem(
        lambda w, lam, b: (w.square() * (1 + lam["a"] + lam["b"])).sum() / 2,
        lambda w, lam, b: w.sum() + lam["a"].square().sqrt(),
    )
    estimate = hyperopt.hypergradient(problem, torch.ones(2), lam, adjoint=OneStep(), step=0.1)
    with pytest.raises(SolveError, match=r"of lam\['a'\] is not finite.*square root.*no \.grad was changed"):
        estimate.backward(lam)
    assert hyper.raw["a"].grad is None and hyper.raw["b"].grad is None


def test_the_cause_is_an_outer_loss_that_is_not_finite():
    lam = {"a": torch.ones((), requires_grad=True)}
    problem = BilevelProblem(FOLLOWING.inner_loss, lambda w, lam, b: (w / 0).sum())
    estimate = hyperopt.hypergradient(problem, torch.ones(1), lam, adjoint=OneStep(), step=0.1)
    with pytest.raises(SolveError, match="the outer loss is inf"):
        estimate.backward(lam)
    assert lam["a"].grad is None


@pytest.mark.filterwarnings("ignore::hyperopt.core.policy.SolveWarning")
def test_the_cause_is_the_adjoint():
    lam = {"a": torch.ones((), requires_grad=True)}
    problem = BilevelProblem(lambda w, lam, b: -(w - lam["a"]).square().sum(), lambda w, lam, b: w.sum())
    estimate = hyperopt.hypergradient(problem, torch.ones(1), lam, adjoint=Implicit(CG()))
    with pytest.raises(SolveError, match="adjoint solve ended as negative_curvature"):
        estimate.backward(lam)
    assert lam["a"].grad is None


def test_an_optimizer_sees_nothing_of_it():
    hyper = Hyperparameters({"a": Real(0.0)})
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    problem = BilevelProblem(FOLLOWING.inner_loss, lambda w, lam, b: w.sum() + lam["a"].abs().sqrt())
    for _ in range(2):
        lam = hyper.values()
        with pytest.raises(SolveError, match="not finite"):
            hyperopt.hypergradient(problem, torch.zeros(1), lam).backward(lam)
        optimizer.step()
    assert float(hyper.raw["a"].detach()) == 0.0


# ---- what has no use


METHODS = [SOBA(), SABA(), StocBiO(), F2SA(), VPBGD()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_inner_of_a_single_loop_method(method):
    for make in (
        lambda: Bilevel(FOLLOWING, torch.zeros(2), inner=GD, adjoint=method),
        lambda: hyperopt.hypergradient(FOLLOWING, torch.zeros(2), {"a": torch.ones(2)}, inner=InnerLBFGS(), adjoint=method),
    ):
        with pytest.raises(ValueError, match=rf"{type(method).__name__} trains the weights itself and would ignore inner="):
            make()


@pytest.mark.parametrize("adjoint", [*METHODS, Unrolled(), Checkpointed()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("given", [{"curvature": "gauss_newton"}, {"step": 0.1}, {"resample": True}], ids=str)
def test_products_of_a_method_that_makes_none(adjoint, given):
    (name,) = given
    inner = None if adjoint in METHODS else GD
    with pytest.raises(ValueError, match=f"{type(adjoint).__name__} does not use {name}="):
        hyperopt.hypergradient(FOLLOWING, torch.zeros(2), {"a": torch.ones(2)}, inner=inner, adjoint=adjoint, **given)
    with pytest.raises(ValueError, match=f"{type(adjoint).__name__} does not use {name}="):
        Bilevel(FOLLOWING, torch.zeros(2), inner=inner, adjoint=adjoint, products=ProductSettings(**given))


def test_a_curvature_beside_finite_differences():
    with pytest.raises(ValueError, match="FiniteDifference does not use curvature='gauss_newton'"):
        hyperopt.hypergradient(
            FOLLOWING, torch.zeros(2), {"a": torch.ones(2)}, adjoint=FiniteDifference(), curvature="gauss_newton"
        )


@pytest.mark.parametrize("linear", [CG(), hyperopt.GMRES(), hyperopt.Dense(), hyperopt.Nystrom()], ids=lambda s: s.name)
def test_a_step_of_a_method_that_does_not_iterate_the_map(linear):
    with pytest.raises(ValueError, match=rf"{linear.name} does not use step=0\.3; leave step out"):
        hyperopt.hypergradient(FOLLOWING, torch.zeros(2), {"a": torch.ones(2)}, adjoint=Implicit(linear), step=0.3)


def test_fallbacks_that_no_policy_asks_for():
    with pytest.raises(ValueError, match="Implicit: fallback is only used under policy='fallback', but policy='warn'"):
        Implicit(Neumann(), fallback=[CG()])
    with pytest.raises(ValueError, match="fixed_point: fallback is only used under policy='fallback', but policy='raise'"):
        fixed_point(lambda w: w / 2, torch.ones(2), policy="raise", fallback=[Anderson()])
    with pytest.raises(TypeError, match=r"fallback\[0\]=CG.* is not a FixedPointSolver"):
        fixed_point(lambda w: w / 2, torch.ones(2), policy="fallback", fallback=[CG()])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", [SOBA(), SABA()], ids=lambda m: type(m).__name__)
def test_hyperparameters_that_change_between_the_steps_of_a_single_loop(method):
    problem = BilevelProblem(
        lambda w, lam, b: (w - sum(x.mean() for x in lam.values())).square().sum(), lambda w, lam, b: (w - 3).square().sum()
    )
    bilevel = Bilevel(problem, torch.zeros(2), adjoint=method)
    bilevel.step({"a": torch.ones(3)})
    with pytest.raises(ValueError, match=r"lam\['a'\] had shape \[3\] .* has \[2\] now"):
        bilevel.step({"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"lam\['b'\] had shape None"):
        bilevel.step({"a": torch.ones(3), "b": torch.ones(1)})
    bilevel.step({"a": torch.ones(3)})


# ---- states


def run(adjoint: Any = None, w: Any = None, size: int | None = 10) -> Bilevel:
    ridge = Ridge()

    def loss(w, lam, batch):
        return (batch[0] @ w - batch[1]).square().mean() / 2 + (lam.exp() * w.square()).sum() / 2

    problem = BilevelProblem(
        loss, loss, Minibatches((ridge.x, ridge.y), size, seed=1), Minibatches((ridge.xv, ridge.yv), size, seed=2)
    )
    return Bilevel(problem, torch.zeros(8, dtype=DOUBLE) if w is None else w, adjoint=adjoint or SOBA())


def whole(bilevel: Bilevel) -> str:
    return repr(copy.deepcopy(bilevel.state_dict()))


BROKEN = {
    "another shape": (lambda s: {**s, "w": [torch.zeros(1, dtype=DOUBLE)]}, r"entry w has shape \(1,\), but here .*\(8,\)"),
    "more dimensions": (lambda s: {**s, "w": [s["w"][0][None]]}, r"entry w has shape \(1, 8\)"),
    "another dtype": (lambda s: {**s, "w": [s["w"][0].long()]}, "entry w has dtype torch.int64"),
    "fewer tensors": (lambda s: {**s, "w": []}, "'w' has 0 tensors, but here it has 1"),
    "no memory": (lambda s: {k: v for k, v in s.items() if k != "memory"}, "has no entry 'memory'"),
    "an unknown entry": (lambda s: {**s, "momentum": 1}, "unknown entry 'momentum'"),
    "no mapping": (lambda s: [s], "is a list"),
    "the place of other batches": (
        lambda s: {**s, "outer_batches": {"epoch": 0, "number": 7}},
        "number=7 is not a place in these batches",
    ),
    "no place": (lambda s: {**s, "outer_batches": {}}, "has no entry 'epoch', 'number'"),
    "numbers for weights": (lambda s: {**s, "w": [1.0]}, "entry w is a float"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(name):
    change, message = BROKEN[name]
    ridge, bilevel = Ridge(), run()
    for _ in range(3):
        bilevel.step(ridge.lam)
    state = copy.deepcopy(bilevel.state_dict())
    bilevel.step(ridge.lam)
    before = whole(bilevel)
    with pytest.raises((TypeError, ValueError), match=message):
        bilevel.load_state_dict(change(state))
    assert whole(bilevel) == before
    bilevel.load_state_dict(state)
    assert whole(bilevel) != before


def test_a_state_of_a_problem_without_batches_does_not_fit_one_with_batches():
    with_batches, without = run(), Bilevel(Ridge().problem, torch.zeros(8, dtype=DOUBLE), adjoint=SOBA())
    with pytest.raises(ValueError, match="no entry 'epoch'"):
        with_batches.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="NoBatches has the unknown entry 'epoch'"):
        without.load_state_dict(with_batches.state_dict())


def test_a_state_in_float32_goes_into_float64_and_not_back():
    low, high = (run(w=torch.ones(8, dtype=dtype)) for dtype in (torch.float32, DOUBLE))
    with pytest.raises(ValueError, match=r"torch.float64, which torch.float32 cannot hold exactly"):
        low.load_state_dict(high.state_dict())
    high.load_state_dict(low.state_dict())


def test_a_state_of_another_network_does_not_fit_a_self_tuning_one():
    def made(size):
        torch.manual_seed(0)
        net = stn.convert(torch.nn.Linear(size, 1), stn.HyperSpace({"decay": stn.Positive(0.1)}))
        return stn.SelfTuning(net, lambda m, b, d: m(b, d).sum(), lambda m, b, d: m(b).sum())

    small, large = made(2), made(3)
    before = repr(large.state_dict())
    with pytest.raises(ValueError, match=r"has shape .*, but here it has shape"):
        large.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match="SelfTuning has no entry 'watch'"):
        large.load_state_dict({k: v for k, v in large.state_dict().items() if k != "watch"})
    assert repr(large.state_dict()) == before


# ---- numbers of numpy


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        (lambda: Picard(rtol=np.float32(0.25)), "rtol", 0.25),
        (lambda: Picard(max_steps=np.int64(5)), "max_steps", 5),
        (lambda: Anderson(window=np.array(3)), "window", 3),
        (lambda: GradientDescent(step_size=np.float64(0.5)), "step_size", 0.5),
        (lambda: HeavyBall(momentum=np.float32(0.5)), "momentum", 0.5),
        (lambda: InnerAdam(betas=np.array([0.5, 0.75])), "betas", (0.5, 0.75)),
        (lambda: TorchOptimizer(lr=np.float16(0.5), max_steps=np.uint8(4)), "max_steps", 4),
        (lambda: TorchOptimizer(keep=np.bool_(False)), "keep", False),  # pyright: ignore[reportArgumentType]
        (lambda: SOBA(step_size=np.float64(0.25), decay=np.int32(1)), "decay", 1),
        (lambda: StocBiO(steps=np.int16(3)), "steps", 3),
        (lambda: VPBGD(ramp=np.int64(10), end=np.float32(20)), "end", 20.0),
        (lambda: SABA(seed=np.uint32(7)), "seed", 7),
        (lambda: ProductSettings(step=np.float64(0.5), warm=np.bool_(True)), "warm", True),  # pyright: ignore[reportArgumentType]
        (lambda: hyperopt.Bounded(low=np.float32(-1), high=np.int64(2)), "high", 2),
        (lambda: stn.Positive(init=np.float64(0.5)), "init", 0.5),
        (lambda: hyperopt.InnerConstants(np.float64(0.5), np.float32(1), np.int64(1)), "smoothness", 1.0),
        (lambda: hyperopt.Nystrom(rank=np.int64(3)), "rank", 3),
    ],
)
def test_numbers_of_numpy_are_numbers(made, name, value):
    found = getattr(made(), name)
    assert found == value and type(found) is type(value)


def test_numbers_of_numpy_are_checked_as_any_others():
    for make, message in (
        (lambda: Picard(max_steps=np.int64(0)), "max_steps=0 must be a whole number >= 1"),
        (lambda: Picard(max_steps=np.float64(5.0)), r"max_steps=5\.0 must be a whole number"),
        (lambda: Picard(max_steps=np.bool_(True)), "max_steps=True must be a whole number"),
        (lambda: GradientDescent(step_size=np.float32("nan")), "step_size=nan is not in"),
        (lambda: GradientDescent(step_size=np.array([0.1, 0.2])), "is not in"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_numbers_of_numpy_give_the_same_solve():
    def solve(solver, scales):
        return fixed_point(lambda w: torch.cos(w), torch.ones(3, dtype=DOUBLE), solver=solver, scales=scales).value

    assert torch.equal(
        solve(Picard(1e-6, max_steps=50), 2.0), solve(Picard(np.float64(1e-6), max_steps=np.int64(50)), np.float32(2))
    )
    hyper = Hyperparameters(
        {"a": Real(np.float64(0.5), per="element"), "b": Real(np.array([1.0, 2.0]), per="element")},
        {"a": (np.int64(3),), "b": np.int32(2)},
    )
    assert hyper.raw["a"].shape == (3,) and hyper.read()["b"].tolist() == [1.0, 2.0]


# ---- a status prints its name


def test_a_status_prints_its_name():
    status = Status.diverged
    assert (str(status), f"{status}", f"{status:>10}", f"{status:d}", repr(status)) == (
        "diverged",
        "diverged",
        "  diverged",
        "7",
        "<Status.diverged: 7>",
    )
    assert status == 7 and status > Status.converged and int(status) == 7 and Status(7) is status


def test_statistics_and_estimates_print_it_too():
    sol = fixed_point(lambda w: w / 2 + 1, torch.zeros(3, 2))
    assert repr(sol.forward).startswith("SolveStats(Picard: converged, iterations=") and "rows=3" in repr(sol.forward)
    estimate = hyperopt.hypergradient(FOLLOWING, torch.ones(1), {"a": torch.ones(())}, inner=GD)
    assert "GradientDescent: fixed_steps" in repr(estimate) and "CG: converged" in repr(estimate)


# ---- names in the package


@pytest.mark.parametrize(
    "expression",
    [
        *("hyperopt.core.fixed_point", "hyperopt.data.DataError", "hyperopt.bilevel.soba"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hyperopt.nn.DEQ", "hyperopt.stn.convert")),
    ],
)
def test_names_in_the_package(expression):
    """After a bare ``import hyperopt``, which loads no torch."""
    package = ".".join(expression.split(".")[:2])
    code = f"import sys, hyperopt; assert 'torch' not in sys.modules; {package}"
    code += f"; {expression}" if expression.split(".")[1] in ("nn", "stn", "data") else ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match=r"no attribute 'DEQ'; it has .*nn"):
        _ = hyperopt.DEQ  # pyright: ignore[reportAttributeAccessIssue]
    assert {"nn", "stn", "core", "hypergradient"} <= set(dir(hyperopt))
