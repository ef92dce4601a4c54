"""Maps and losses that change in place what they are given, or what they close over: refused, or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt as ho
from hyperopt.nn import DEQ

D: dict[str, Any] = {"dtype": torch.float64}
TIGHT = ho.Picard(rtol=1e-12, max_steps=500)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **D)


A, X = 0.3 * drawn(3, 3, seed=1), drawn(4, 3)


def fixed(phi: Callable[..., Any], *args: Any, w0: Any = None, **options: Any) -> Any:
    return ho.fixed_point(phi, torch.zeros(4, 3, **D) if w0 is None else w0, args=args, solver=TIGHT, **options).value


def plain(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ A + x)


WANTED = fixed(plain, X)


def halved(z: Tensor, x: Tensor) -> Tensor:
    z.mul_(0.5)
    return torch.tanh(2 * z @ A + x)


def a_view(z: Tensor, x: Tensor) -> Tensor:
    z[0].mul_(0.5)
    return plain(z, x)


def its_data(z: Tensor, x: Tensor) -> Tensor:
    z.data.mul_(0.5)
    return torch.tanh(2 * z @ A + x)


def written_into(z: Tensor, x: Tensor) -> Tensor:
    return z.copy_(plain(z, x))


def as_out(z: Tensor, x: Tensor) -> Tensor:
    h = plain(z, x)
    torch.tanh(h.detach(), out=z.detach())
    return h


def the_argument(z: Tensor, x: Tensor) -> Tensor:
    x.mul_(0.9)
    return plain(z, x)


def the_detached_argument(z: Tensor, x: Tensor) -> Tensor:
    x.detach().mul_(0.9)
    return plain(z, x)


def an_activation(z: Tensor, x: Tensor) -> Tensor:
    return plain(z, nn.functional.silu(x, inplace=True))


CHANGING = [
    halved,
    a_view,
    its_data,
    written_into,
    as_out,
    the_argument,
    the_detached_argument,
    an_activation,
]


@pytest.mark.parametrize("phi", CHANGING, ids=lambda phi: phi.__name__)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", [TIGHT, ho.Anderson(), ho.Broyden(), ho.Newton()], ids=lambda s: type(s).__name__)
def test_a_map_that_changes_what_it_is_given_is_refused(phi: Any, mode: str, solver: Any) -> None:
    """In every mode, those of inference among them, which count no changes."""
    with MODES[mode](), pytest.raises((ValueError, RuntimeError), match=r"in.place"):  # Newton's leaves: by PyTorch itself
        ho.fixed_point(phi, torch.zeros(4, 3, **D), args=(X.clone(),), solver=solver)


@pytest.mark.parametrize("phi", CHANGING, ids=lambda phi: phi.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_a_cell_that_changes_what_it_is_given_is_refused(phi: Any, mode: str) -> None:
    class Cell(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return phi(z, x)

    with MODES[mode](), pytest.raises((ValueError, RuntimeError), match="in place"):
        DEQ(Cell(), TIGHT)(X.clone())


@pytest.mark.parametrize("adjoint", [ho.Unrolled(), ho.Checkpointed(), ho.OneStep(), ho.Phantom()], ids=repr)
@pytest.mark.parametrize("phi", [halved, the_argument], ids=lambda phi: phi.__name__)
def test_every_adjoint_refuses_it(adjoint: Any, phi: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"in.place"):
        ho.fixed_point(phi, torch.zeros(4, 3, **D), args=(X.clone(),), adjoint=adjoint)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tuple", "dict", "argument"])
def test_a_leaf_of_a_state_or_of_an_argument_is_seen(kind: str, mode: str) -> None:
    def phi(state: Any, x: Any) -> Any:
        if kind == "argument":
            x["more"][0].mul_(0.9)
        else:
            state[1 if kind == "tuple" else "b"].add_(0.1)
        a, b = state if kind != "dict" else (state["a"], state["b"])
        new = torch.tanh(a @ A + x["u"]), 0.5 * b
        return {"a": new[0], "b": new[1]} if kind == "dict" else new

    with MODES[mode](), pytest.raises((ValueError, RuntimeError), match="in place"):
        zeros = torch.zeros(4, 3, **D), torch.zeros(4, 2, **D)
        w0 = {"a": zeros[0], "b": zeros[1]} if kind == "dict" else zeros
        ho.fixed_point(phi, w0, args=({"u": X.clone(), "more": [X.clone()]},), rows="batch", solver=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_another_precision_it_is_refused_or_right(dtype: torch.dtype) -> None:
    def phi(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(2 * z.mul_(0.5) @ A.to(dtype) + x)

    try:
        value = ho.fixed_point(phi, torch.zeros(4, 3, dtype=dtype), args=(X.to(dtype),), policy="ignore").value
    except (ValueError, RuntimeError) as error:
        assert "in place" in str(error)
    else:
        assert torch.allclose(value.double(), WANTED, atol=4 * torch.finfo(dtype).eps)


# ---- what a map closes over


class Decaying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", X.clone())

    def forward(self, z: Tensor) -> Tensor:
        self.x.mul_(0.99)  # pyright: ignore[reportCallIssue]
        return plain(z, self.x)  # pyright: ignore[reportArgumentType]


def drifting(kind: str) -> Callable[[Tensor], Tensor]:
    """A map that is another one at every call, by a tensor that it closes over in this way."""
    x, kept, mean = X.clone(), {"x": [X.clone()]}, torch.zeros((), **D)
    if kind == "a module":
        return Decaying()
    if kind == "a method":
        return Decaying().forward

    def phi(z: Tensor, default: Tensor = X.clone()) -> Tensor:  # noqa: B008
        at = {"a tensor": x, "a container": kept["x"][0], "a default": default}.get(kind)
        if at is None:
            mean.mul_(0.9).add_(0.1 * z.detach().mean())
            return plain(z, X + mean)
        return plain(z, at.mul_(0.99) if kind != "a tensor" else nn.functional.silu(x, inplace=True))

    return phi


@pytest.mark.parametrize("kind", ["a tensor", "a container", "a default", "a mean", "a module", "a method"])
@pytest.mark.parametrize("adjoint", [ho.Implicit(), ho.Unrolled()], ids=["implicit", "unrolled"])
def test_a_map_that_changes_what_it_closes_over_is_refused(kind: str, adjoint: Any) -> None:
    with pytest.raises(ho.ImpureMapError, match=r"closes over.* in place"):
        ho.fixed_point(drifting(kind), torch.zeros(4, 3, **D), adjoint=adjoint, policy="ignore")


def test_memory_that_a_map_writes_its_steps_into_and_counters_are_allowed() -> None:
    memory, calls = torch.zeros(4, 3, **D), torch.zeros((), **D)

    def phi(z: Tensor) -> Tensor:
        calls.add_(1)
        with torch.no_grad():
            torch.mm(z.detach(), A, out=memory)
        return torch.tanh(memory + X)

    assert torch.allclose(fixed(phi), WANTED, atol=1e-10)
    assert calls > 5


@pytest.mark.parametrize("mode", MODES)
def test_what_a_map_has_made_itself_it_may_change(mode: str) -> None:
    def phi(z: Tensor, x: Tensor) -> Tensor:
        mine = z.clone()
        mine.mul_(0.5)
        return (2 * mine @ A).add_(x).tanh_()

    with MODES[mode]():
        assert torch.allclose(fixed(phi, X), WANTED, atol=1e-10)


# ---- losses


def losses(change: Callable[[Any, Any, Any], None], where: str) -> ho.BilevelProblem:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return (batch["x"] @ w["a"] - lam["t"]).square().mean() + lam["l2"] * w["a"].square().sum()

    def changing(w: Any, lam: Any, batch: Any) -> Tensor:
        value = loss(w, lam, batch)
        with torch.no_grad():
            change(w, lam, batch)
        return value

    inner, outer = (changing, loss) if where == "inner" else (loss, changing)
    return ho.BilevelProblem(inner, outer, inner_batches={"x": drawn(6, 3)}, outer_batches={"x": drawn(6, 3, seed=1)})


CHANGES: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "weights": (lambda w, lam, batch: w["a"].clamp_(-1, 1), r"w\['a'\]"),
    "a view of weights": (lambda w, lam, batch: w["a"][0].mul_(0.9), r"w\['a'\]"),
    "a hyperparameter": (lambda w, lam, batch: lam["l2"].clamp_(min=0), r"lam\['l2'\]"),
    "the batch": (lambda w, lam, batch: batch["x"].div_(2), r"batch\['x'\]"),
    "the batch by an activation": (lambda w, lam, batch: nn.functional.silu(batch["x"], inplace=True), r"batch\['x'\]"),
}
ADJOINTS = [None, ho.Unrolled(), ho.Checkpointed(), ho.FiniteDifference(), ho.StocBiO(step_size=0.01), ho.F2SA(step_size=0.01)]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_a_loss_that_changes_what_it_is_given_is_refused(kind: str, where: str, adjoint: Any) -> None:
    change, named = CHANGES[kind]
    problem = losses(change, where)
    single = isinstance(adjoint, ho.StocBiO | ho.F2SA)
    # By name, or, where the first evaluation is watched for a replay, by shape.
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"{where}_loss changed {named} in place|changes one of its arguments.* in place"
    ):
        ho.hypergradient(
            problem,
            {"a": drawn(3)},
            {"t": torch.ones((), **D), "l2": torch.tensor(0.1, **D)},
            inner=None if single else ho.GradientDescent(step_size=0.1, max_steps=3),
            adjoint=adjoint,
        )


@pytest.mark.parametrize("adjoint", [ho.Implicit(ho.CG()), ho.Unrolled()], ids=["implicit", "unrolled"])
def test_a_network_with_activations_in_place_is_a_network(adjoint: Any) -> None:
    """On what it has made itself: the same hypergradient as without."""
    x, y = drawn(10, 3), drawn(10, 1, seed=1)

    def gradient(inplace: bool) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8, **D), nn.SiLU(inplace=inplace), nn.Linear(8, 1, **D))
        model = ho.Functional(net)

        def loss(w: Any, lam: Any, batch: Any) -> Tensor:
            return (model(w, batch[0]) - batch[1]).square().mean() + lam * sum(p.square().sum() for p in w.values())

        problem = ho.BilevelProblem(loss, loss, inner_batches=(x, y), outer_batches=(x.flip(0), y))
        inner = ho.GradientDescent(step_size=0.05, max_steps=20)
        return ho.hypergradient(problem, model.w, torch.tensor(0.5, **D), inner=inner, adjoint=adjoint).grad

    assert torch.equal(gradient(True), gradient(False))
    assert bool(torch.isfinite(gradient(True)).all())
