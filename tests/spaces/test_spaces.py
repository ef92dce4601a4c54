"""Spaces of hyperparameters: round trips, bounds, projections, and the units of the reader."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from hyperopt import Bounded, Hyperparameters, Positive, PositiveDefinite, Real, Simplex, SpectralBall

DOUBLE = torch.float64
RANDOM = torch.Generator().manual_seed(0)
BALL = torch.randn(4, 3, generator=RANDOM, dtype=DOUBLE)
BALL = (0.9 * 2.0 * BALL / torch.linalg.matrix_norm(BALL, 2)).tolist()
SPACES = {
    "real": (Real([-3.0, 0.0, 1e5], per="element"), (3,)),
    "exp": (Positive([1e-8, 1.0, 1e5], per="element"), (3,)),
    "softplus": (Positive([1e-4, 1.0, 1e5], per="element", map="softplus"), (3,)),
    "bounded": (Bounded([-0.9, 0.2, 2.9], low=-1, high=3, per="element"), (3,)),
    "simplex": (Simplex([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]]), (2, 3)),
    "ball": (SpectralBall(BALL, radius=2.0), (4, 3)),
    "definite": (PositiveDefinite([[2.0, -0.5, 0.1], [-0.5, 1.0, 0.3], [0.1, 0.3, 0.5]]), (3, 3)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", SPACES)
def test_a_value_comes_back_in_its_own_units(name, dtype, tolerance):
    space, shape = SPACES[name]
    hyper = Hyperparameters({name: space}, {name: shape}, dtype=dtype)
    torch.testing.assert_close(hyper.read()[name], torch.tensor(space.init, dtype=dtype), rtol=tolerance, atol=0)
    assert hyper.raw[name].dtype == dtype and hyper.raw[name].requires_grad


@pytest.mark.parametrize("name", SPACES)
def test_the_map_is_differentiable(name):
    space, shape = SPACES[name]
    raw = space.raw(torch.Size(shape), DOUBLE, "cpu", "key")
    assert gradcheck(space.value, (raw.clamp(-3, 3).requires_grad_(),))


def test_the_ball_at_equal_singular_values():
    raw = torch.zeros(3, 3, dtype=DOUBLE, requires_grad=True)  # where an SVD has no derivative
    assert gradcheck(SpectralBall(radius=2.0).value, (raw,))
    far = 1e4 * torch.randn(3, 3, generator=RANDOM, dtype=DOUBLE)
    assert 1.999 < float(torch.linalg.matrix_norm(SpectralBall(radius=2.0).value(far), 2)) < 2.0


OUTSIDE = [
    (Positive(0.0), "0.0"),
    (Positive(-1.0), "-1.0"),
    (Positive(float("nan")), "nan"),
    (Positive(float("inf"), by="projection"), "inf"),
    (Positive(-1e-9, by="projection"), "-1e-09"),
    (Bounded(1.0), "1.0"),
    (Bounded(0.0), "0.0"),
    (Bounded(1 - 1e-9), "0.999999999"),  # is 1 in float32
    (Bounded(1.5, by="projection"), "1.5"),
    (Bounded([0.2, 2.0], per="element"), "2.0"),
    (Simplex([0.5, 0.6]), "[0.5, 0.6]"),
    (Simplex([1.0, 0.0]), "[1.0, 0.0]"),
    (SpectralBall([[1.0, 0.0], [0.0, 0.1]]), "1.0"),
    (PositiveDefinite([[1.0, 2.0], [2.0, 1.0]]), "[[1.0, 2.0], [2.0, 1.0]]"),  # an eigenvalue of -1
    (PositiveDefinite([[1.0, 0.5], [0.0, 1.0]]), "[[1.0, 0.5], [0.0, 1.0]]"),  # not symmetric
    (PositiveDefinite([[1.0, 1.0], [1.0, 1.0]]), "[[1.0, 1.0], [1.0, 1.0]]"),  # singular
    (Real(float("inf")), "inf"),
    (Real("much"), "much"),
    (Real([1.0, 2.0, 3.0], per="element"), "[1.0, 2.0, 3.0]"),
]


@pytest.mark.parametrize(("space", "shown"), OUTSIDE, ids=[repr(space) for space, _ in OUTSIDE])
def test_an_initial_value_outside_is_refused_with_value_and_key(space, shown):
    shape = (2, 2) if isinstance(space, SpectralBall | PositiveDefinite) else (2,)
    with pytest.raises(ValueError, match=r"task\.space\.mine\.init") as refused:
        Hyperparameters({"mine": space}, {"mine": shape}, dtype=torch.float32, key="task.space")
    assert shown in str(refused.value)


def test_a_bound_itself_has_its_place_by_projection():
    for space in (Positive(0.0, by="projection"), Bounded(1.0, by="projection")):
        assert float(Hyperparameters({"a": space}).read()["a"]) == space.init


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Bounded(low=1.0, high=1.0), r"low=1\.0 is not below high=1\.0"),
        (lambda: Positive(map="sigmoid"), "map='sigmoid' is not one of exp, softplus"),
        (lambda: Real(per="row"), "per='row' is not one of tensor, element"),
        (lambda: Real(by="magic"), "by='magic' is not one of"),
        (lambda: SpectralBall(radius=0.0), r"radius=0\.0 is not in \(0\.0"),
        (lambda: Hyperparameters({}), "there are no hyperparameters"),
        (lambda: Hyperparameters({"a": Real()}, {"b": (2,)}), "'b', which has no space; the spaces are a"),
    ],
)
def test_bad_settings(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def nearest(space, value, candidates):
    """Whether no candidate inside of the space is nearer to ``value`` than the projection."""
    found = space.project(value)
    assert bool(space.inside(found, interior=False).all())
    inside = [c for c in candidates if bool(space.inside(c, interior=False).all())]
    assert inside
    return all((found - value).norm() <= (c - value).norm() + 1e-12 for c in inside)


def test_projections_are_the_nearest_points():
    grid = [torch.tensor(c, dtype=DOUBLE) / 20 for c in itertools.product(range(21), repeat=3) if sum(c) == 20]
    for value in torch.randn(20, 3, generator=RANDOM, dtype=DOUBLE):
        assert nearest(Simplex(), value, grid)
    balls = [SpectralBall().value(5 * torch.randn(3, 2, generator=RANDOM, dtype=DOUBLE)) for _ in range(300)]
    for value in torch.randn(20, 3, 2, generator=RANDOM, dtype=DOUBLE):
        assert nearest(SpectralBall(radius=1.001), 2 * value, balls)
    factors = [torch.randn(2, 2, generator=RANDOM, dtype=DOUBLE) for _ in range(300)]
    for value in factors[:20]:
        assert nearest(PositiveDefinite(), value, [each @ each.mT for each in factors])
    assert torch.equal(Hyperparameters({"a": PositiveDefinite()}, {"a": (2, 2)}).read()["a"], torch.eye(2))


def test_a_step_by_projection_ends_in_the_space():
    spaces = {
        "a": Bounded([0.1, 0.9], per="element", by="projection"),
        "b": Simplex(by="projection"),
        "c": SpectralBall(0.1, by="projection"),
        "d": Positive(0.5),
    }
    hyper = Hyperparameters(spaces, {"a": (2,), "b": (4,), "c": (3, 3)}, dtype=DOUBLE)
    optimizer = torch.optim.SGD([tensor for group in hyper.groups().values() for tensor in group], lr=10.0)
    torch.stack([leaf.square().sum() + leaf.sum() for leaf in hyper.values().values()]).sum().backward()
    optimizer.step()
    hyper.project_()
    for name, space in spaces.items():
        assert bool(space.inside(hyper.read()[name], interior=False).all())
    assert hyper.read()["a"].tolist() == [0.0, 0.0]


def test_one_number_for_each_leaf_of_a_tree():
    w = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    each = Hyperparameters({"decay": Positive(0.1, per="element")}, {"decay": w})
    assert {k: v.shape for k, v in each.read()["decay"].items()} == {k: v.shape for k, v in w.items()}
    one = Hyperparameters({"decay": Positive(0.1)}, {"decay": w})
    assert {k: tuple(v.shape) for k, v in one.read()["decay"].items()} == {"weight": (), "bias": ()}
    assert one.metrics() == pytest.approx({f"hyper/decay/{kind}": 0.1 for kind in ("mean", "min", "max")})
    assert [len(group) for group in one.groups().values()] == [2]


def test_state_comes_back_in_place():
    hyper = Hyperparameters({"a": Positive(0.1), "b": Real(per="element")}, {"b": (3,)})
    leaves = hyper.groups()
    kept = {name: tensor.clone() for name, tensor in hyper.state_dict().items()}
    with torch.no_grad():
        leaves["a"][0].add_(1.0)
    hyper.load_state_dict(kept)
    assert hyper.groups()["a"][0] is leaves["a"][0]
    assert hyper.metrics()["hyper/a"] == pytest.approx(0.1)
